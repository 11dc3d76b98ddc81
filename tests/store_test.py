"""The token store: lossless, reusable, resumable, and particular about its tokenizer."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import shutil
import time

import numpy as np
import pytest

from lmjax.data import sources, store, tokenizer
from lmjax.errors import UserError

BYTES = tokenizer.get('bytes', ())


@pytest.fixture
def source(corpus):
  return sources.open_source(str(corpus / 'train.txt'), document='line')


@pytest.mark.parametrize(
  'text',
  [
    '',
    'One.',
    'One. Two! "Three?" (Four.) Five',
    'No end and no capital. but more',
    'Title\n\nA paragraph.\n\n\n  Another one... And on.',
    'x' * 25_000,
    'Ünï. Çödé! ' * 50,
  ],
)
def test_sentences_are_the_text_cut_up(text):
  cut = store.split_sentences(text)
  assert ''.join(cut) == text
  assert all(0 < len(s) <= store.LONGEST_SENTENCE for s in cut)


def test_sentences_end_where_people_end_them():
  cut = store.split_sentences('It is 3.5 m. "Really?" he asked. Yes (it is.) Good.\n\nnew part')
  assert [s.strip() for s in cut] == [
    'It is 3.5 m.',
    '"Really?" he asked.',
    'Yes (it is.)',
    'Good.',
    'new part',
  ]


def test_a_store_holds_the_documents(source, tmp_path):
  built = store.build(source, BYTES, str(tmp_path))
  assert built.num_documents == len(source)
  for i in range(len(source)):
    start, stop = built.documents[i : i + 2]
    ids = built.read(start, stop)
    assert ids[-1] == BYTES.eos
    assert BYTES.decode(ids[:-1].tolist()) == source[i]
  assert built.num_bytes == sum(len(source[i].encode()) for i in range(len(source)))
  assert set(built.documents[:-1]) <= set(built.sentences)
  memory = store.from_documents([source[i] for i in range(len(source))], BYTES)
  np.testing.assert_array_equal(memory.read(0, len(memory)), built.read(0, len(built)))
  np.testing.assert_array_equal(memory.sentences, built.sentences)


def test_reads_cross_shards(source, tmp_path):
  built = store.build(source, BYTES, str(tmp_path))
  assert len(built.shards) == 8
  whole = np.concatenate(built.shards)
  rng = np.random.default_rng(0)
  for _ in range(200):
    start, stop = sorted(rng.integers(0, len(whole) + 1, 2))
    if start < stop:
      np.testing.assert_array_equal(built.read(start, stop), whole[start:stop])


def test_a_second_build_reads_nothing(source, tmp_path):
  first = store.build(source, BYTES, str(tmp_path))

  class Unreadable:
    fingerprint, spec = source.fingerprint, source.spec

  assert store.build(Unreadable(), BYTES, str(tmp_path)).digest == first.digest


@pytest.mark.parametrize('locks', [True, False])
def test_of_two_that_build_one_store_the_other_waits(source, tmp_path, monkeypatch, locks):
  """Where the disk has no locks, each builds it, and both get the same."""
  began, build = [], store._build_shards

  def slowly(*args):
    began.append(args)
    while not locks and len(began) < 2:
      time.sleep(0.01)
    build(*args)

  def no_locks(*_):
    raise OSError('Function not implemented')

  monkeypatch.setattr(store, '_build_shards', slowly)
  if not locks:
    monkeypatch.setattr(store.fcntl, 'flock', no_locks)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    built = list(pool.map(lambda _: store.build(source, BYTES, str(tmp_path)), range(2)))
  assert len(began) == (1 if locks else 2)
  assert built[0].digest == built[1].digest
  assert not list(tmp_path.rglob('*.tmp'))


def test_an_interrupted_build_goes_on(source, tmp_path):
  whole = store.build(source, BYTES, str(tmp_path / 'whole'))
  path = store.build(source, BYTES, str(tmp_path / 'cut')).path
  from etils import epath

  directory = epath.Path(path)
  (directory / 'store.json').unlink()
  shutil.rmtree(str(directory / 'shard-00005'))
  read = []

  class Watched:
    fingerprint, spec = source.fingerprint, source.spec

    def __len__(self):
      return len(source)

    def __getitem__(self, i):
      read.append(i)
      return source[i]

  assert store.build(Watched(), BYTES, str(tmp_path / 'cut')).digest == whole.digest
  n = len(source)
  assert read == list(range(n * 5 // 8, n * 6 // 8))


def test_a_store_of_another_tokenizer_is_refused(source, tmp_path):
  path = store.build(source, BYTES, str(tmp_path)).path
  other = tokenizer.get('characters', ['abc'])
  with pytest.raises(UserError, match='another tokenizer'):
    store.open_store(path, other)
  with pytest.raises(UserError, match='no finished token store'):
    store.open_store(str(tmp_path), BYTES)


def test_a_damaged_store_is_a_sentence(source, tmp_path):
  path = store.build(source, BYTES, str(tmp_path)).path
  tokens = pathlib.Path(path) / 'shard-00002' / 'tokens.npy'
  for break_it in (lambda: tokens.write_bytes(tokens.read_bytes()[:50]), tokens.unlink):
    break_it()
    with pytest.raises(UserError, match=f'token store {path} is damaged .* remove it'):
      store.build(source, BYTES, str(tmp_path))


class Slow:
  """A source that never ends, whose readers say who they are."""

  spec = fingerprint = 'slow'

  def __init__(self, directory):
    self.directory = directory

  def __len__(self):
    return 2

  def __getitem__(self, i):
    (self.directory / str(os.getpid())).touch()
    time.sleep(600)


def lives(pid: int) -> bool:
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
  except (FileNotFoundError, ProcessLookupError):
    return False
  return state != 'Z'  # ended, but nobody asked for it: in a container the first process may not


def test_no_worker_outlives_a_killed_build(tmp_path):
  readers = tmp_path / 'readers'
  readers.mkdir()
  main = multiprocessing.get_context('spawn').Process(
    target=store.build, args=(Slow(readers), BYTES, str(tmp_path))
  )
  main.start()
  while len(workers := [int(p.name) for p in readers.iterdir()]) < min(2, os.cpu_count()):
    assert main.is_alive()
    time.sleep(0.05)
  assert main.pid not in workers
  assert all(map(lives, workers))
  main.kill()
  main.join()
  ended = time.monotonic() + 20
  while any(map(lives, workers)):
    assert time.monotonic() < ended
    time.sleep(0.05)


def test_digest_is_of_the_content(source, tmp_path):
  @dataclasses.dataclass
  class Changed:
    spec: str = 'changed'
    fingerprint: str = 'changed'

    def __len__(self):
      return len(source)

    def __getitem__(self, i):
      return source[i] if i else 'x' + source[i]

  texts = lambda s: [s[i] for i in range(len(s))]
  digests = [store.from_documents(texts(s), BYTES).digest for s in (source, Changed())]
  assert digests[0] != digests[1]
  assert store.build(source, BYTES, str(tmp_path)).digest == digests[0]
