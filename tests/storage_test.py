"""A disk that is full, or that fails, or another ledger: what is said, and what survives."""

import collections
import re
import shutil
import sys
import time
import types

import pytest
from etils import epath

from lmjax import disk, jsonio, metrics, train
from lmjax.errors import Restart, StorageError, UserError
from tests.processes_test import free_port, spawn
from tests.stopping_test import after, signalled
from tests.train_test import as_file, assert_same_run, lines, timeless_result

# Before anything is written, as where no directory can be made, and after.
BROKEN = ('Checkpointer.save', 'PyTreeCheckpointHandler.finalize')


def failing(patch, name: str, calls: set[int]) -> None:
  """Some calls of a part of Orbax find a full disk."""
  import orbax.checkpoint as ocp

  owner, method = name.split('.')
  real, count = getattr(getattr(ocp, owner), method), [0]

  def call(*args, **kwargs):
    count[0] += 1
    if count[0] in calls:
      raise OSError(28, 'No space left on device')
    return real(*args, **kwargs)

  patch.setattr(f'orbax.checkpoint.{name}', call)


@pytest.fixture(scope='module')
def straight(tiny, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('straight')
  train.run(tiny('clm', **{'checkpoint.every': 2}), str(workdir))
  return workdir


@pytest.mark.parametrize('broken', BROKEN)
def test_a_checkpoint_that_cannot_be_written_is_outlived(
  tiny, tmp_path, monkeypatch, straight, broken, capfd
):
  failing(monkeypatch, broken, {2})
  train.run(tiny('clm', **{'checkpoint.every': 2}), str(tmp_path))
  said = capfd.readouterr().err
  assert f'checkpoint 4 could not be saved in {tmp_path}/checkpoints: [Errno 28] No space' in said
  assert 'training goes on' in said
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2', '6']
  assert_same_run(straight, tmp_path)
  assert timeless_result(straight) == timeless_result(tmp_path)


UNSAVED = """
import runpy, sys
import orbax.checkpoint as ocp
real, count = ocp.{broken}, []
def call(*args, **kwargs):
  count.append(1)
  if len(count) == 2:
    raise OSError(28, 'No space left on device')
  return real(*args, **kwargs)
ocp.{broken} = call
sys.argv = {argv}
runpy.run_module('lmjax.main', run_name='__main__')
"""


@pytest.mark.parametrize(
  ('hurt', 'broken', 'count'), [(0, BROKEN[0], 2), (0, BROKEN[1], 2), (1, BROKEN[0], 3)]
)
def test_where_one_process_cannot_save_the_others_do_not_wait(tiny, tmp_path, hurt, broken, count):
  """In Orbax's barrier, which is patient for 300 s."""
  c = tiny('clm', **{'steps': 8, 'checkpoint.every': 2, 'batch': 24})
  flags = [as_file(c, tmp_path), f'--workdir={tmp_path / "run"}', f'--processes={count}']
  flags += [f'--coordinator=localhost:{free_port()}']
  argv = [['main', *flags, f'--process={i}'] for i in range(count)]
  codes = [['-m', 'lmjax.main', *argv[i][1:]] for i in range(count)]
  codes[hurt] = ['-c', UNSAVED.format(argv=argv[hurt], broken=broken)]
  pair = [spawn(code) for code in codes]
  began = time.monotonic()
  said = [process.communicate(timeout=400)[1] for process in pair]
  assert [process.returncode for process in pair] == [0] * count, said
  assert time.monotonic() - began < 120
  assert re.search('checkpoint 4 could not be saved in .* No space left .* training goes', said[0])
  assert sorted(p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()) == ['6', '8']


@pytest.mark.parametrize('broken', BROKEN)
def test_without_the_last_checkpoint_a_run_is_not_done(
  tiny, tmp_path, monkeypatch, straight, broken
):
  c = tiny('clm', **{'checkpoint.every': 2})
  with monkeypatch.context() as patch:
    failing(patch, broken, {3})
    with pytest.raises(StorageError, match='checkpoint 6 could not be saved'):
      train.run(c, str(tmp_path))
  assert not (tmp_path / 'result.json').exists()
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2', '4']
  train.run(c, str(tmp_path))
  assert_same_run(straight, tmp_path)


def test_what_cannot_be_removed_does_not_hide_why_nothing_was_saved(
  tiny, tmp_path, monkeypatch, capfd
):
  failing(monkeypatch, BROKEN[1], {3})

  def read_only(path):
    raise OSError(30, 'Read-only file system', 'process_0')  # the part of a path that rmtree knows

  monkeypatch.setattr(epath.gpath.PosixGPath, 'rmtree', read_only)
  with pytest.raises(StorageError, match=r'checkpoint 6 could not be saved in .*No space'):
    train.run(tiny('clm', **{'checkpoint.every': 2, 'checkpoint.keep_last': 3}), str(tmp_path))
  said = capfd.readouterr().err
  assert re.search('6.orbax-checkpoint-tmp could not be removed: .*Read-only', said)


def test_threads_that_come_late_to_a_failed_save_are_not_heard(monkeypatch):
  heard = []
  monkeypatch.setattr(sys, 'unraisablehook', heard.append)
  disk.hush.__wrapped__()
  abouts = [
    types.SimpleNamespace(exc_value=e)
    for e in (RuntimeError('Event loop is closed'), RuntimeError('another'), None)
  ]
  for about in abouts:
    sys.unraisablehook(about)
  assert heard == abouts[1:]


@pytest.mark.parametrize('name', ['metrics', 'ledger'])
def test_a_line_that_cannot_be_written_says_of_which_file(tiny, tmp_path, monkeypatch, name):
  push = metrics.Log.push

  def full(log, step, *rest):
    if step == 4:
      log._files[name]._file = epath.Path('/dev/full').open('a')
    push(log, step, *rest)

  monkeypatch.setattr(metrics.Log, 'push', full)
  with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/{name}.jsonl'"):
    train.run(tiny('clm'), str(tmp_path))


def test_a_save_that_failed_meanwhile_does_not_hide_a_bug(tiny, tmp_path, monkeypatch, capfd):
  failing(monkeypatch, BROKEN[1], {1})
  after(monkeypatch, metrics.Log, 'push', 3, lambda: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    train.run(tiny('clm', **{'checkpoint.every': 2}), str(tmp_path))
  said = capfd.readouterr().err
  assert 'checkpoint 2 could not be saved' in said
  assert 'training goes on' not in said


def test_a_run_outlives_that_it_cannot_say_where_its_time_went(tiny, tmp_path, monkeypatch):
  write = jsonio.write_text

  def full(path, text):
    if path.name == 'goodput.json':
      raise OSError(28, 'No space left on device')
    write(path, text)

  monkeypatch.setattr(jsonio, 'write_text', full)
  assert train.run(tiny('clm'), str(tmp_path))['step'] == 6


def test_asked_to_stop_without_room_to_save_is_no_restart(tiny, tmp_path, monkeypatch):
  failing(monkeypatch, BROKEN[1], {1})
  after(monkeypatch, metrics.Log, 'push', 1, signalled)
  with pytest.raises(StorageError, match='checkpoint 1 could not be saved'):
    train.run(tiny('clm'), str(tmp_path))


def test_room_is_looked_for_before_anything_is_compiled(tiny, tmp_path, monkeypatch):
  usage = collections.namedtuple('usage', 'total used free')
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(10**9, 10**9 - 10**5, 10**5))
  monkeypatch.setattr(train, 'lower', lambda *_: pytest.fail('compiled'))
  with pytest.raises(
    StorageError, match=r'has \S+ GB free, and needs room for 3 more checkpoints of 0\.000\d+ GB'
  ):
    train.run(tiny('clm'), str(tmp_path))
  assert not (tmp_path / 'config.json').exists()


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(tiny, tmp_path, monkeypatch):
  c = tiny('clm', **{'checkpoint.every': 2})
  after(monkeypatch, metrics.Log, 'push', 5, signalled)
  with pytest.raises(Restart):
    train.run(c, str(tmp_path))
  monkeypatch.undo()
  shutil.rmtree(tmp_path / 'checkpoints')
  before = (tmp_path / 'ledger.jsonl').read_bytes()
  with pytest.raises(StorageError, match='has made 5 steps, and its checkpoints are gone'):
    train.run(c, str(tmp_path))
  assert (tmp_path / 'ledger.jsonl').read_bytes() == before
  (tmp_path / 'ledger.jsonl').unlink()
  assert train.run(c, str(tmp_path))['step'] == 6


@pytest.mark.parametrize('held', [False, True])
def test_another_ledger_is_noticed(tiny, tmp_path, monkeypatch, held):
  """As where the code that makes batches has changed."""
  c = tiny('clm', **({'log.every': 5} if held else {}))
  after(monkeypatch, metrics.Log, 'push', 2, signalled)
  with pytest.raises(Restart):
    train.run(c, str(tmp_path))
  monkeypatch.undo()
  assert [line['step'] for line in lines(tmp_path, 'ledger')] == ([] if held else [1, 2])
  monkeypatch.setattr(
    'lmjax.data.loader.epoch_key', lambda seed, epoch: seed + epoch + 1, raising=True
  )
  with pytest.raises(UserError, match=r'the batch of step 2 was [0-9a-f]{16} in .* and is'):
    train.run(c, str(tmp_path))


def test_a_full_disk_is_74(tmp_path):
  code = (
    'from lmjax import command\n'
    'def main():\n  raise OSError(28, "No space left on device", "/run/metrics.jsonl")\n'
    'command.run(main, ["it"])\n'
  )
  process = spawn(['-c', code])
  _, said = process.communicate(timeout=30)
  assert process.returncode == 74
  assert said == "lmjax: storage: [Errno 28] No space left on device: '/run/metrics.jsonl'\n"
