"""What differs in a bucket: nothing is added to a file, none is renamed, no directory is empty."""

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from lmjax import jsonio, metrics, steps

LOG = {'every': 2, 'tensorboard': False}
COST = {'tokens': 1, 'flops': 1, 'peak': 1.0}


@pytest.fixture
def bucket(monkeypatch):
  """A path of a bucket that lies in memory, behind the same library as those of Google."""

  class Bucket(MemoryFileSystem):
    store, pseudo_dirs = {}, ['']

    @classmethod
    def _strip_protocol(cls, path):
      return '/' + path.rpartition('://')[2].strip('/')

  monkeypatch.setattr(epath.backend._FileSystemSpecBackend, 'fs', lambda *_: Bucket())
  return epath.Path('gs://bucket/run')


def made(directory: epath.Path, step: int, marked: bool = True) -> None:
  """As Orbax leaves a step: all under its last name, and the mark when it is complete."""
  path = directory / str(step)
  (path / 'state' / 'd').write_text('x')
  (path / 'meta' / 'metadata').write_text('{}')
  if marked:
    (path / 'commit_success.txt').write_text('')


def test_lines_are_added_to_those_of_former_starts(bucket):
  for step in (1, 2, 3):
    lines = jsonio.Lines(bucket / 'ledger.jsonl')
    lines.add({'step': step})
    lines.sync()
    assert [line['step'] for line in jsonio.read_lines(bucket / 'ledger.jsonl')][-1] == step
    lines.add({'step': step + 0.5})
    lines.close()
  steps_there = [line['step'] for line in jsonio.read_lines(bucket / 'ledger.jsonl')]
  assert steps_there == [1, 1.5, 2, 2.5, 3, 3.5]


def test_once_a_minute_lines_are_written_by_themselves(bucket, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(jsonio.time, 'monotonic', lambda: now[0])
  lines = jsonio.Lines(bucket / 'ledger.jsonl')
  lines.add({'step': 1})
  assert not (bucket / 'ledger.jsonl').exists()
  now[0] = 61.0
  lines.add({'step': 2})
  assert len(list(jsonio.read_lines(bucket / 'ledger.jsonl'))) == 2


def test_a_log_that_is_taken_up_has_all_lines(bucket):
  numbers = {'terms': {}, 'metrics': {}, 'optimizer': {}, 'guard': {}}
  for start, stop, kept in ((0, 5, [1, 2, 3, 4, 5]), (3, 6, [1, 2, 3, 4, 5, 6])):
    with metrics.Log(bucket, start, 6, LOG, COST, lambda *_: True) as log:
      for step in range(start + 1, stop + 1):
        log.push(step, step, {**numbers, 'terms': {'clm': (1.0, 1.0)}})
      log.flush()
    assert [line['step'] for line in jsonio.read_lines(bucket / 'ledger.jsonl')] == kept


def test_what_is_not_marked_was_never_a_checkpoint(bucket):
  there = steps.Steps(bucket / 'checkpoints', read_only=False)
  assert there.all() == []
  assert not there.any_aside()
  made(bucket / 'checkpoints', 1)
  made(bucket / 'checkpoints', 2, marked=False)
  assert there.all() == [1]
  there = steps.Steps(bucket / 'checkpoints', read_only=False)
  assert there.all() == [1]
  assert [path.name for path in (bucket / 'checkpoints').iterdir()] == ['1']
  assert not there.any_aside()
  there.delete(1)
  assert there.all() == []
