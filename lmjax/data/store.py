"""The token store: a source tokenized once, then read at random access.

A store is a directory, keyed by the fingerprints of its source and tokenizer:

  shard-00000/tokens.npy      uint16 or uint32, every document followed by the end-of-text token
  shard-00000/documents.npy   int64, where each document begins in tokens.npy
  shard-00000/sentences.npy   int64, where each sentence begins
  shard-00000/bytes.npy       int64, the length of each document's text in UTF-8
  shard-00000/replaced.npy    int64, how many of its characters are U+FFFD, for what is not UTF-8
  store.json                  totals, fingerprints, checksums; written last: with it, it is whole

Shards are built in parallel, each in a directory that is renamed when done, so that an interrupted
build goes on where it stopped.  One whose files are not what was written is built again.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
import uuid
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lmjax import jsonio
from lmjax.data import building, cache
from lmjax.data.building import ARRAYS
from lmjax.data.pieces import Tokenizer
from lmjax.data.sources import Source
from lmjax.errors import StorageError, UserError
from lmjax.terminal import say

FORMAT = 3
AT_ONCE = 2 << 30  # bytes that are checked before a store is used; larger ones beside its use


class DamagedStore(StorageError):
  """Files of a token store are not what was written."""


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
  replaced: tuple[int, int] = (0, 0)  # characters that are U+FFFD; documents that have any
  path: str = ''
  damage: Sequence[str] = ()  # what a check has found that runs beside

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
    """Tokens [start, stop) as stored, a view where they lie in one shard.

    Raises:
      DamagedStore: a shard is not what was written.
    """
    if self.damage:
      raise DamagedStore(f'the token store {self.path} is damaged ({", ".join(self.damage)})')
    shard = bisect.bisect_right(self._starts, start) - 1
    first = self._starts[shard]
    if stop <= self._starts[shard + 1]:
      return self.shards[shard][start - first : stop - first]
    middle = self._starts[shard + 1]
    return np.concatenate([self.read(start, middle), self.read(middle, stop)])


def build(source: Source, tokenizer: Tokenizer, place: str) -> Store:
  """The store of `source` under `tokenizer` in the cache at `place`, built where it is not there.

  Raises:
    UserError: a source without text, or one whose records cannot be read.
  """
  key = f'{FORMAT} {source.fingerprint} {tokenizer.fingerprint}'
  directory = epath.Path(place).expanduser() / 'stores' / _hash(key.encode())
  if not (directory / 'store.json').exists():
    with cache.lock(directory) as alone:
      if not (directory / 'store.json').exists():
        building.build_shards(source, tokenizer, directory, alone)
        _commit(source, tokenizer, directory)
  try:
    store = open_store(str(directory), tokenizer)
  except DamagedStore as e:
    say(f'{e}: built again')
    with cache.lock(directory) as alone:
      _rebuild(source, tokenizer, directory, alone)
    store = open_store(str(directory), tokenizer)
  if store.replaced[0]:
    characters, documents = store.replaced
    say(
      f'{source.spec}: {characters:,} characters, in {documents:,} of {store.num_documents:,} '
      'documents, are U+FFFD: not UTF-8, or replaced by somebody before'
    )
  return store


def _rebuild(source: Source, tokenizer: Tokenizer, directory: epath.Path, alone: bool) -> None:
  try:
    meta = _meta(directory)
    damaged = _damage(directory, meta)  # another process may have mended it
  except DamagedStore:  # of its shards nothing is known
    meta, damaged = None, [path.name for path in directory.glob('shard-*')]
  (directory / 'damaged').unlink(missing_ok=True)
  if not damaged:
    return
  for shard in damaged:
    aside = directory / f'{shard}.{uuid.uuid4().hex[:8]}.damaged'
    with contextlib.suppress(FileNotFoundError):
      (directory / shard).rename(aside)
      aside.rmtree()
  building.build_shards(source, tokenizer, directory, alone)
  _commit(source, tokenizer, directory)
  now = _meta(directory)['digest']
  if meta and now != meta['digest']:
    raise UserError(
      f'{source.spec} gives other tokens than those of the store {directory}, of which a part was '
      f'damaged ({meta["digest"]}, now {now}): a run that began with it cannot go on'
    )


def open_store(path: str, tokenizer: Tokenizer) -> Store:
  """Opens a built store.

  Raises:
    UserError: it is not whole, or was made with another tokenizer.
    DamagedStore: a shard is not what was written.
  """
  directory = epath.Path(path)
  if not (directory / 'store.json').exists():
    raise UserError(f'{path} is no finished token store: it has no store.json')
  meta = _meta(directory)
  if meta['tokenizer'] != tokenizer.fingerprint:
    raise UserError(
      f'the token store {path} was made with another tokenizer ({meta["tokenizer"]}, not '
      f'{tokenizer.fingerprint}): build it again with this one'
    )
  damage: list[str] = []
  mark = directory / 'damaged'  # what was found beside is mended at the next start

  def check():
    damage.extend(f'{shard} {why}' for shard, why in _damage(directory, meta).items())
    if damage:
      mark.touch()

  checker = threading.Thread(target=check, name='checksums', daemon=True)
  checker.start()
  sizes = (size for files in meta['files'].values() for size, _ in files.values())
  if sum(sizes) <= AT_ONCE or mark.exists():
    checker.join()
  if damage:
    raise DamagedStore(f'the token store {path} is damaged ({", ".join(damage)})')
  shards = [directory / f'shard-{i:05d}' for i in range(len(meta['files']))]
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
    replaced=tuple(meta['replaced']),
    path=path,
    damage=damage,
  )


def from_documents(texts: Sequence[str], tokenizer: Tokenizer) -> Store:
  """A small store in memory."""
  tokens, documents, sentences, sizes, _ = building.encode(texts, tokenizer)
  ends = np.append(documents, len(tokens))
  return Store([tokens], ends, sentences, int(sizes.sum()), _hash(tokens.tobytes()))


def _commit(source, tokenizer, directory: epath.Path) -> None:
  shards = sorted(p for p in directory.iterdir() if re.fullmatch(r'shard-\d+', p.name))
  tokens = [_load(shard / 'tokens.npy') for shard in shards]
  sizes = [_load(shard / 'bytes.npy') for shard in shards]
  replaced = np.concatenate([_load(shard / 'replaced.npy') for shard in shards])
  meta = {
    'format': FORMAT,
    'source': source.fingerprint,
    'spec': source.spec,
    'tokenizer': tokenizer.fingerprint,
    'shards': len(shards),
    'tokens': sum(map(len, tokens)),
    'documents': sum(map(len, sizes)),
    'bytes': int(sum(s.sum() for s in sizes)),
    'replaced': [int(replaced.sum()), int((replaced > 0).sum())],
    'digest': _hash(*(np.ascontiguousarray(t) for t in tokens)),
    'files': {
      shard.name: {name: _checksum(shard / f'{name}.npy') for name in ARRAYS} for shard in shards
    },
  }
  scratch = directory / f'store.{uuid.uuid4().hex[:8]}.tmp'
  meta['checksum'] = _hash(json.dumps(meta, sort_keys=True).encode())
  scratch.write_text(json.dumps(meta, indent=2))
  scratch.replace(directory / 'store.json')


def _meta(directory: epath.Path) -> dict[str, Any]:
  try:
    meta = jsonio.read(directory / 'store.json')
    whole = meta.pop('checksum') == _hash(json.dumps(meta, sort_keys=True).encode())
    whole &= list(meta['files']) == [f'shard-{i:05d}' for i in range(len(meta['files']))]
    whole &= all(tuple(files) == ARRAYS for files in meta['files'].values())
  except (ValueError, KeyError, AttributeError, TypeError):
    whole = False
  if not whole:
    raise DamagedStore(f'the token store {directory} is damaged (store.json)')
  return meta


def _damage(directory: epath.Path, meta: Mapping[str, Any]) -> dict[str, str]:
  """Shard -> what is wrong with its files."""

  def look(shard):
    for name, written in meta['files'][shard].items():
      try:
        now = _checksum(directory / shard / f'{name}.npy')
      except OSError as e:
        return f'{name}: {e.strerror}'
      if now != written:
        what = (
          'its checksum is another' if now[0] == written[0] else f'{now[0]} of {written[0]} bytes'
        )
        return f'{name}: {what}'
    return ''

  return {shard: why for shard in meta['files'] if (why := look(shard))}


def _checksum(path: epath.Path) -> list[int]:
  """[bytes, CRC-32], at 1 to 3 GB a second."""
  size = crc = 0
  with path.open('rb') as file:
    while block := file.read(1 << 24):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return [size, crc]


def _load(path: epath.Path) -> np.ndarray:
  """Mapped into memory from a local disk; read whole from a bucket."""
  try:
    if '://' not in str(path):
      # Slices of a plain array are made ten times faster than those of an np.memmap.
      return np.asarray(np.load(path, mmap_mode='r', allow_pickle=False))
    with path.open('rb') as file:
      return np.load(file, allow_pickle=False)
  except (ValueError, EOFError) as e:
    raise DamagedStore(f'the token store {path.parent.parent} is damaged ({path.name}: {e})') from e


def _hash(*parts) -> str:
  digest = hashlib.blake2b(digest_size=8)
  for part in parts:
    digest.update(part)
  return digest.hexdigest()
