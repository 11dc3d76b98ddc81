"""What is there twice: documents of one store, and text that two stores share.

Text that an evaluation set shares with the training set is looked for twice.  As whole documents,
and as windows of some tokens, for a quotation in a longer document; windows of 50 tokens are those
of Lee et al., 2022 (Deduplicating Training Data Makes Language Models Better).

Hashes have 64 bits: that any two of 10^8 unequal texts have the same has a probability below 10^-3.
Of a store of more than BUDGET tokens a part is looked at.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lmjax.data.store import Store

BUDGET = 1 << 26  # tokens of the training set that are read: some seconds
EVALUATED = 1 << 22  # .. and of each evaluation set, whose windows are all in memory
DOCUMENT = 128  # a document takes as long as so many tokens, however short
CHUNK = 1 << 20  # tokens at a time
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_TABLE = 26  # bits


class Documents(NamedTuple):
  """Those of a store that have text, or a sample of them."""

  hashes: np.ndarray  # uint64[n]
  lengths: np.ndarray  # int64[n], in tokens, without the end of the text
  share: float  # of the store's text, in tokens

  @property
  def repeated(self) -> np.ndarray:
    """bool[n], whether a document is equal to one before it."""
    first = np.unique(self.hashes, return_index=True)[1]
    return ~np.isin(np.arange(len(self.hashes)), first)


def sampling(store: Store) -> int:
  """One in how many lengths of documents is to be looked at, a power of two: 1 if all can be."""
  lengths = np.diff(store.documents) - 1
  lengths, counts = np.unique(lengths[lengths > 0], return_counts=True)
  cost, one_in = counts * (lengths + DOCUMENT), 1
  while cost[_is_in_sample(lengths, one_in)].sum() > BUDGET:
    one_in *= 2
  return one_in


def documents(store: Store, one_in: int = 1) -> Documents:
  """Hashes of the documents that have text, or of those of one in so many lengths.

  Copies have the same length: either all of them are looked at or none, in every store.
  """
  lengths = np.diff(store.documents) - 1
  chosen = np.flatnonzero((lengths > 0) & _is_in_sample(lengths, one_in))
  starts, sizes = store.documents[chosen], lengths[chosen]
  spans = zip(starts.tolist(), (starts + sizes).tolist(), strict=True)
  digest = lambda a, b: hashlib.blake2b(store.read(a, b), digest_size=8).digest()
  hashes = np.frombuffer(b''.join(digest(a, b) for a, b in spans), np.uint64)
  return Documents(hashes, sizes, sizes.sum() / max(1, lengths.sum()))


def _is_in_sample(lengths: np.ndarray, one_in: int) -> np.ndarray:
  # Of a product modulo 2^64 the upper bits look random.
  return (lengths.astype(np.uint64) * np.uint64(_BASE) >> np.uint64(32)) % np.uint64(one_in) == 0


def spread(n: int, count: int) -> np.ndarray:
  """int64, so many of n indices, or all: the middles of equal parts, so that no end weighs more."""
  count = min(n, count)
  return (2 * np.arange(count) + 1) * n // (2 * count or 1)


def stretches(tokens: int, budget: int) -> Iterator[tuple[int, int]]:
  """Bounds of pieces that cover so many tokens, or hold `budget` of them, spread evenly."""
  for piece in spread(-(-tokens // CHUNK), budget // CHUNK).tolist():
    yield piece * CHUNK, min((piece + 1) * CHUNK, tokens)


def windows(train: Store, others: Mapping[str, Store], n: int) -> dict[str, float]:
  """The share of the tokens of each store that lie in n tokens in a row that `train` holds, too.

  Windows run across documents.  Of a larger `train` than BUDGET only a part is read, and a share is
  then the least that it can be; of a larger store than EVALUATED a sample is looked at.
  """
  texts = {name: list(_evaluated(store)) for name, store in others.items()}
  size = 1 + max((int(x.max()) for store in texts.values() for x in store), default=0)
  hashes = {name: [window_hashes(x, n, size) for x in parts] for name, parts in texts.items()}
  wanted = np.sort(np.concatenate([np.zeros(0, np.uint64), *itertools.chain(*hashes.values())]))
  wanted = wanted[np.diff(wanted, prepend=~wanted[:1]) != 0]  # np.unique takes thirty times as long
  keys, seen = np.append(wanted, np.uint64(0)), np.zeros(len(wanted) + 1, bool)
  # A table of their upper bits tells at once of most others that they are not among them.
  upper, table = np.uint64(64 - _TABLE), np.zeros(1 << _TABLE, bool)
  table[wanted >> upper] = True
  for start, stop in stretches(len(train), BUDGET) if len(wanted) else ():
    found = window_hashes(train.read(start, min(stop + n - 1, len(train))), n, size)
    found = np.sort(found[table[found >> upper]])  # sorted, a search finds its way in the cache
    at = np.searchsorted(wanted, found)
    seen[at[keys[at] == found]] = True
  shares = {}
  for name, parts in hashes.items():
    covered = [_covered(seen[np.searchsorted(wanted, x)], n) for x in parts]
    shares[name] = sum(x.sum() for x in covered) / max(1, sum(map(len, texts[name])))
  return shares


def window_hashes(tokens: np.ndarray, n: int, size: int) -> np.ndarray:
  """uint64[len(tokens) - n + 1], one for each n tokens in a row; `size` bounds the tokens.

  The polynomial of Karp and Rabin, 1987, modulo 2^64, of a random number for each token; a
  difference of prefix sums instead of a rolling sum, so that all are computed at once.
  """
  count = len(tokens) - n + 1
  if count < 1:
    return np.zeros(0, np.uint64)
  powers, inverses = _powers(_BASE, len(tokens)), _powers(pow(_BASE, -1, 1 << 64), count)
  sums = np.zeros(len(tokens) + 1, np.uint64)
  np.cumsum(_numbers(size)[np.minimum(tokens, size, dtype=np.int64)] * powers, out=sums[1:])
  return (sums[n:] - sums[:-n]) * inverses


def _evaluated(store: Store) -> Iterator[np.ndarray]:
  if len(store) <= EVALUATED:
    yield store.read(0, len(store))
    return
  for start, stop in stretches(len(store), EVALUATED):
    yield store.read(start, stop)


def _covered(found: np.ndarray, n: int) -> np.ndarray:
  """bool[len(found) + n - 1], whether a token lies in a window that was found."""
  change = np.zeros(len(found) + n, np.int64)
  change[: len(found)] += found
  change[n:] -= found
  return np.cumsum(change[:-1]) > 0


@functools.lru_cache(2)
def _numbers(size: int) -> np.ndarray:
  """One for each token, and one for all that are larger."""
  return np.random.default_rng(0).integers(1 << 64, size=size + 1, dtype=np.uint64)


def _powers(base: int, count: int) -> np.ndarray:
  """The first powers, beginning with 1, modulo 2^64."""
  return _all_powers(base, max(CHUNK + 1024, 1 << (count - 1).bit_length()))[:count]


@functools.lru_cache(4)
def _all_powers(base: int, count: int) -> np.ndarray:
  powers = np.full(count, base, np.uint64)
  powers[0] = 1
  return np.cumprod(powers)
