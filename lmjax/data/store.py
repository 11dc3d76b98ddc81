"""The token store: a source tokenized once, then read at random access.

A store is a directory, keyed by the fingerprints of its source and tokenizer:

  shard-00000/tokens.npy      uint16 or uint32, every document followed by the end-of-text token
  shard-00000/documents.npy   int64, where each document begins in tokens.npy
  shard-00000/sentences.npy   int64, where each sentence begins
  shard-00000/bytes.npy       int64, the length of each document's text in UTF-8
  store.json                  totals and fingerprints; written last, so a store with it is whole

Shards are built in parallel, each in a directory of its own that is renamed when done, so that an
interrupted build goes on where it stopped.
"""

import bisect
import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from lmjax.data.pieces import Tokenizer
from lmjax.data.sources import Source
from lmjax.errors import UserError

FORMAT = 1
DOCUMENTS_PER_SHARD = 50_000
LONGEST_SENTENCE = 10_000  # characters; text without an end of sentence is cut there

# A sentence ends after . ! ? and what closes it, before white space and a capital, a digit or an
# opening mark, or before a blank line.  White space goes with what follows, as in subword tokens.
_END = re.compile(r'[.!?]["\')\]]*(?=\s+["\'(\[]?[A-Z0-9])|(?<=\S)(?=\s*\n\s*\n)')


def split_sentences(text: str) -> list[str]:
  """Cuts a text into sentences; joined, they are the text again."""
  ends = [m.end() for m in _END.finditer(text)]
  bounds = [0, *(e for e in ends if 0 < e < len(text)), len(text)]
  sentences = [text[a:b] for a, b in itertools.pairwise(bounds) if a < b]
  n = LONGEST_SENTENCE
  return [s[i : i + n] for s in sentences for i in range(0, len(s), n)]


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
  """Token arrays, one a shard, read as one long array.

  documents: int64[num_documents + 1], where each document begins, and the end.
  sentences: int64[], where each sentence begins, in the same numbering.
  """

  shards: Sequence[np.ndarray]
  documents: np.ndarray
  sentences: np.ndarray
  num_bytes: int  # of the original text, in UTF-8
  digest: str  # identity of the content: equal stores hold equal tokens
  path: str = ''

  def __post_init__(self):
    starts = np.cumsum([0, *(len(s) for s in self.shards)])
    object.__setattr__(self, '_starts', starts.tolist())

  def __len__(self) -> int:
    """The number of tokens."""
    return self._starts[-1]

  @property
  def num_documents(self) -> int:
    return len(self.documents) - 1

  def read(self, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop) as stored, a view where they lie in one shard."""
    shard = bisect.bisect_right(self._starts, start) - 1
    first = self._starts[shard]
    if stop <= self._starts[shard + 1]:
      return self.shards[shard][start - first : stop - first]
    middle = self._starts[shard + 1]
    return np.concatenate([self.read(start, middle), self.read(middle, stop)])


def build(source: Source, tokenizer: Tokenizer, cache: str) -> Store:
  """The store of `source` under `tokenizer` in `cache`, built as far as it is not there yet.

  Raises:
    UserError: a source without text, or one whose records cannot be read.
  """
  key = f'{FORMAT} {source.fingerprint} {tokenizer.fingerprint}'
  directory = epath.Path(cache).expanduser() / 'stores' / _hash(key.encode())
  if not (directory / 'store.json').exists():
    with lock(directory):
      if not (directory / 'store.json').exists():
        _build_shards(source, tokenizer, directory)
        _commit(source, tokenizer, directory)
  return open_store(str(directory), tokenizer)


@contextlib.contextmanager
def lock(directory: epath.Path) -> Iterator[None]:
  """Of the processes that see one disk, only one at a time is in here, to make `directory`.

  Buckets and some network disks have no locks: there each makes it, and the last rename decides.
  """
  if '://' in str(directory):
    yield
    return
  try:
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = open(f'{directory}.lock', 'w')  # noqa: SIM115
  except OSError as e:
    raise UserError(
      f'cannot keep anything in {directory.parent}: {e.strerror}: choose a cache'
    ) from e
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'waiting for another process that makes {directory}', flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      pass
    yield


def open_store(path: str, tokenizer: Tokenizer) -> Store:
  """Opens a built store.

  Raises:
    UserError: it is not whole, or was made with another tokenizer.
  """
  directory = epath.Path(path)
  if not (directory / 'store.json').exists():
    raise UserError(f'{path} is no finished token store: it has no store.json')
  meta = json.loads((directory / 'store.json').read_text())
  if meta['tokenizer'] != tokenizer.fingerprint:
    raise UserError(
      f'the token store {path} was made with another tokenizer ({meta["tokenizer"]}, not '
      f'{tokenizer.fingerprint}): build it again with this one'
    )
  shards = [directory / f'shard-{i:05d}' for i in range(meta['shards'])]
  tokens = [_load(shard / 'tokens.npy') for shard in shards]
  starts = np.cumsum([0, *(len(t) for t in tokens)])
  offsets = list(zip(shards, starts, strict=False))
  documents = [_load(shard / 'documents.npy') + start for shard, start in offsets]
  sentences = [_load(shard / 'sentences.npy') + start for shard, start in offsets]
  return Store(
    shards=tokens,
    documents=np.concatenate([*documents, starts[-1:]]),
    sentences=np.concatenate(sentences),
    num_bytes=meta['bytes'],
    digest=meta['digest'],
    path=path,
  )


def from_documents(texts: Sequence[str], tokenizer: Tokenizer) -> Store:
  """A small store in memory."""
  tokens, documents, sentences, sizes = _encode(texts, tokenizer)
  ends = np.append(documents, len(tokens))
  return Store([tokens], ends, sentences, int(sizes.sum()), _hash(tokens.tobytes()))


def _build_shards(source, tokenizer, directory: epath.Path) -> None:
  n = len(source)
  num_shards = min(n, max(8, -(-n // DOCUMENTS_PER_SHARD)))
  bounds = [n * i // num_shards for i in range(num_shards + 1)]
  jobs = [
    (source, tokenizer, str(directory / f'shard-{i:05d}'), bounds[i], bounds[i + 1])
    for i in range(num_shards)
    if not (directory / f'shard-{i:05d}').exists()
  ]
  directory.mkdir(parents=True, exist_ok=True)
  from tqdm import tqdm  # only a build needs it

  quiet = not sys.stderr.isatty()
  if quiet:
    print(f'tokenizing {source.spec}', flush=True)
  bar = tqdm(total=len(jobs), desc=f'tokenizing {source.spec}', unit='shard', disable=quiet)
  workers = min(len(jobs), os.cpu_count() or 1)
  if workers <= 1:
    with bar:
      for job in jobs:
        _build_shard(*job)
        bar.update()
    return
  # Workers start afresh: a forked child of a process that runs JAX threads may hang.
  context = multiprocessing.get_context('spawn')
  executor = concurrent.futures.ProcessPoolExecutor(workers, context, _live_no_longer_than_parent)
  with bar, executor as pool:
    futures = [pool.submit(_build_shard, *job) for job in jobs]
    try:
      for future in concurrent.futures.as_completed(futures):
        future.result()
        bar.update()
    except concurrent.futures.process.BrokenProcessPool as e:
      raise UserError(
        'a process that tokenizes has died: either memory ran out, or a script of yours lacks '
        "`if __name__ == '__main__':` before its work, which every such process imports"
      ) from e
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _live_no_longer_than_parent() -> None:
  """In a worker: its queue does not tell it that the parent was killed; Ctrl-C is the parent's."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _build_shard(source, tokenizer, path: str, start: int, stop: int) -> None:
  arrays = _encode([source[i] for i in range(start, stop)], tokenizer)
  scratch = epath.Path(f'{path}.{uuid.uuid4().hex[:8]}.tmp')
  scratch.mkdir(parents=True)
  for name, array in zip(('tokens', 'documents', 'sentences', 'bytes'), arrays, strict=True):
    with (scratch / f'{name}.npy').open('wb') as file:
      np.save(file, array)
  try:
    scratch.rename(path)
  except OSError:  # another build of the same store was faster
    scratch.rmtree()


def _encode(texts: Sequence[str], tokenizer) -> tuple[np.ndarray, ...]:
  dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
  chunks, documents, sentences, total = [], [], [], 0
  for text in texts:
    documents.append(total)
    for ids in tokenizer.encode_batch(split_sentences(text)):
      if ids:
        sentences.append(total)
        chunks.append(np.array(ids, dtype))
        total += len(ids)
    chunks.append(np.array([tokenizer.eos], dtype))
    total += 1
  tokens = np.concatenate(chunks) if chunks else np.zeros(0, dtype)
  sizes = [len(text.encode()) for text in texts]
  return tokens, *(np.array(x, np.int64) for x in (documents, sentences, sizes))


def _commit(source, tokenizer, directory: epath.Path) -> None:
  shards = sorted(p for p in directory.iterdir() if re.fullmatch(r'shard-\d+', p.name))
  tokens = [_load(shard / 'tokens.npy') for shard in shards]
  sizes = [_load(shard / 'bytes.npy') for shard in shards]
  meta = {
    'format': FORMAT,
    'source': source.fingerprint,
    'spec': source.spec,
    'tokenizer': tokenizer.fingerprint,
    'shards': len(shards),
    'tokens': sum(map(len, tokens)),
    'documents': sum(map(len, sizes)),
    'bytes': int(sum(s.sum() for s in sizes)),
    'digest': _hash(*(np.ascontiguousarray(t) for t in tokens)),
  }
  scratch = directory / f'store.{uuid.uuid4().hex[:8]}.tmp'
  scratch.write_text(json.dumps(meta, indent=2))
  scratch.replace(directory / 'store.json')


def _load(path: epath.Path) -> np.ndarray:
  """Mapped into memory from a local disk; read whole from a bucket."""
  try:
    if '://' not in str(path):
      # Slices of a plain array are made ten times faster than those of an np.memmap.
      return np.asarray(np.load(path, mmap_mode='r', allow_pickle=False))
    with path.open('rb') as file:
      return np.load(file, allow_pickle=False)
  except (OSError, ValueError, EOFError) as e:
    store = path.parent.parent
    raise UserError(f'the token store {store} is damaged ({e}): remove it to have it built') from e


def _hash(*parts) -> str:
  digest = hashlib.blake2b(digest_size=8)
  for part in parts:
    digest.update(part)
  return digest.hexdigest()
