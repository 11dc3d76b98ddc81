"""The token store: lossless, reusable, resumable, and particular about its tokenizer."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import re
import shutil
import threading
import time

import numpy as np
import pytest

from lmjax.data import building, cache, sources, store, tokenizer
from lmjax.errors import StorageError, UserError

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
  cut = building.split_sentences(text)
  assert ''.join(cut) == text
  assert all(0 < len(s) <= building.LONGEST_SENTENCE for s in cut)


def test_sentences_end_where_people_end_them():
  cut = building.split_sentences('It is 3.5 m. "Really?" he asked. Yes (it is.) Good.\n\nnew part')
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


def no_locks(*_):
  raise OSError('Function not implemented')


@pytest.mark.parametrize('locks', [True, False])
def test_of_two_that_build_one_store_the_other_waits(source, tmp_path, monkeypatch, locks):
  """Where the disk has no locks, each builds it, and both get the same."""
  began, build = [], building.build_shards

  def slowly(*args):
    began.append(args)
    while not locks and len(began) < 2:
      time.sleep(0.01)
    build(*args)

  monkeypatch.setattr(building, 'build_shards', slowly)
  if not locks:
    monkeypatch.setattr(cache.fcntl, 'flock', no_locks)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    built = list(pool.map(lambda _: store.build(source, BYTES, str(tmp_path)), range(2)))
  assert len(began) == (1 if locks else 2)
  assert built[0].digest == built[1].digest
  assert not list(tmp_path.rglob('*.tmp'))


@pytest.mark.parametrize('locks', [True, False])
def test_an_interrupted_build_goes_on(source, tmp_path, monkeypatch, locks):
  """And removes what is left of it, where no other can be at work on the same."""
  whole = store.build(source, BYTES, str(tmp_path / 'whole'))
  path = store.build(source, BYTES, str(tmp_path / 'cut')).path
  from etils import epath

  directory = epath.Path(path)
  (directory / 'store.json').unlink()
  shutil.rmtree(str(directory / 'shard-00005'))
  left = [directory / 'shard-00005.0.tmp', directory / 'shard-00004.0.damaged']
  for scratch in left:
    scratch.mkdir()
  if not locks:
    monkeypatch.setattr(cache.fcntl, 'flock', no_locks)
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
  assert [scratch.exists() for scratch in left] == [not locks] * 2


def test_a_store_of_another_tokenizer_is_refused(source, tmp_path):
  path = store.build(source, BYTES, str(tmp_path)).path
  other = tokenizer.get('characters', ['abc'])
  with pytest.raises(UserError, match='another tokenizer'):
    store.open_store(path, other)
  with pytest.raises(UserError, match='no finished token store'):
    store.open_store(str(tmp_path), BYTES)


def flip(path: pathlib.Path, at: int = -3) -> None:
  data = bytearray(path.read_bytes())
  data[at] ^= 4
  path.write_bytes(bytes(data))


DAMAGE = {
  'flipped': (flip, 'its checksum is another'),
  'cut': (lambda path: path.write_bytes(path.read_bytes()[:50]), r'50 of \d+ bytes'),
  'emptied': (lambda path: path.write_bytes(b''), r'0 of \d+ bytes'),
  'deleted': (pathlib.Path.unlink, 'No such file or directory'),
}


def test_what_was_no_text_is_counted_and_said_at_every_start(tmp_path, capsys):
  lines = [b'fine'] * 2000
  lines[7], lines[1500], lines[1900] = b'\xff\xff', 'caf\ufffd'.encode(), b'\xc3\xa9'
  (tmp_path / 'a.txt').write_bytes(b'\n'.join(lines))
  source = sources.open_source(str(tmp_path / 'a.txt'), document='line')
  for _ in range(2):
    assert store.build(source, BYTES, str(tmp_path)).replaced == (3, 2)
    said = 'a.txt: 3 characters, in 2 of 2,000 documents, are U+FFFD: not UTF-8, or replaced by'
    assert said in capsys.readouterr().err


@pytest.mark.parametrize('kind', DAMAGE)
@pytest.mark.parametrize('array', building.ARRAYS)
def test_a_damaged_shard_is_named_and_built_again(source, tmp_path, kind, array, capsys):
  whole = store.build(source, BYTES, str(tmp_path))
  tokens = [whole.read(0, len(whole)).copy(), whole.documents, whole.sentences]
  path = pathlib.Path(whole.path)
  harm, why = DAMAGE[kind]
  harm(path / 'shard-00002' / f'{array}.npy')
  untouched = (path / 'shard-00003').stat().st_mtime_ns
  said = rf'the token store {path} is damaged \(shard-00002 {array}: {why}\)'
  with pytest.raises(StorageError, match=said):
    store.open_store(str(path), BYTES)
  again = store.build(source, BYTES, str(tmp_path))
  assert re.search(rf'lmjax: {said}: built again', capsys.readouterr().err)
  for x, y in zip(
    tokens, [again.read(0, len(again)), again.documents, again.sentences], strict=True
  ):
    np.testing.assert_array_equal(x, y)
  assert again.digest == whole.digest
  assert (path / 'shard-00003').stat().st_mtime_ns == untouched
  assert not list(path.glob('*.damaged'))


def test_a_shard_that_is_gone_is_built_again(source, tmp_path):
  whole = store.build(source, BYTES, str(tmp_path))
  shutil.rmtree(pathlib.Path(whole.path) / 'shard-00002')
  assert store.build(source, BYTES, str(tmp_path)).digest == whole.digest


@pytest.mark.parametrize('at', [3, 40, -30])
def test_where_nothing_is_known_of_the_shards_all_are_built_again(source, tmp_path, at):
  whole = store.build(source, BYTES, str(tmp_path))
  path = pathlib.Path(whole.path)
  flip(path / 'store.json', at)
  flip(path / 'shard-00002' / 'tokens.npy')
  assert store.build(source, BYTES, str(tmp_path)).digest == whole.digest


def test_a_shard_built_again_from_other_text_is_refused(source, tmp_path):
  path = pathlib.Path(store.build(source, BYTES, str(tmp_path)).path)
  flip(path / 'shard-00002' / 'tokens.npy')

  class Changed:
    fingerprint, spec = source.fingerprint, source.spec

    def __len__(self):
      return len(source)

    def __getitem__(self, i):
      return source[i].upper()

  with pytest.raises(UserError, match='gives other tokens than those of the store'):
    store.build(Changed(), BYTES, str(tmp_path))


def test_a_large_store_is_checked_while_it_is_read(source, tmp_path, monkeypatch):
  path = store.build(source, BYTES, str(tmp_path)).path
  flip(pathlib.Path(path) / 'shard-00002' / 'tokens.npy')
  go, real = threading.Event(), store._checksum

  def slowly(file):
    assert go.wait(10)
    return real(file)

  monkeypatch.setattr(store, '_checksum', slowly)
  monkeypatch.setattr(store, 'AT_ONCE', 0)
  opened = store.open_store(path, BYTES)
  opened.read(0, 3)
  go.set()
  (checker,) = (t for t in threading.enumerate() if t.name == 'checksums')
  checker.join()
  with pytest.raises(StorageError, match='shard-00002 tokens: its checksum is another'):
    opened.read(0, 3)
  store.build(source, BYTES, str(tmp_path))  # the next start mends it
  for _ in range(2):
    again = store.open_store(path, BYTES)
    for checker in threading.enumerate():
      if checker.name == 'checksums':
        checker.join()
    assert not again.damage


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
