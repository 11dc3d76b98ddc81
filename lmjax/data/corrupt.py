"""Masks and replacements in NumPy, each a function of a key and nothing else.

b rows, L length, K chosen places.  A row's key is a uint64 made from (seed, example,
epoch), so that its noise is the same on any number of hosts and after any restart.
"""

import functools
from collections.abc import Callable

import numpy as np


def _constant(x: int) -> np.ndarray:
  """Of no dimensions: on short rows NumPy takes two thirds of the time that a scalar costs it."""
  return np.array(x, np.uint64)


GOLDEN, _ONE = _constant(0x9E3779B97F4A7C15), _constant(1)
_MULTIPLIERS = _constant(0xBF58476D1CE4E5B9), _constant(0x94D049BB133111EB)
_SHIFTS = tuple(map(_constant, (30, 27, 31)))


def mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of SplitMix64 (Steele et al., 2014): a bijection of uint64 that looks random."""
  x = x ^ (x >> _SHIFTS[0])
  x *= _MULTIPLIERS[0]
  x ^= x >> _SHIFTS[1]
  x *= _MULTIPLIERS[1]
  x ^= x >> _SHIFTS[2]
  return x


def keys(seed: int, indices: np.ndarray, epochs: np.ndarray) -> np.ndarray:
  """uint64[b] from a seed and, for each row, its example and epoch."""
  key = mix(np.array([seed], np.uint64) + GOLDEN)
  for part in (indices, epochs):
    key = mix(key + GOLDEN * (part.astype(np.uint64) + _ONE))
  return key


@functools.lru_cache(4096)
def epoch_key(seed: int, epoch: int) -> int:
  """The key of an epoch as a whole, which no example of it has."""
  return int(keys(seed, np.array([-1]), np.array([epoch]))[0])


def bits(keys_b: np.ndarray, n: int, stream: int) -> np.ndarray:
  """uint32[b, n], independent for each key and stream; no two of a row are equal.

  The finaliser of MurmurHash3 (Appleby, 2011), a bijection of uint32, of n points on a ring.
  """
  x = mix(keys_b ^ np.uint64(stream)).astype(np.uint32)[:, None]
  x = x + np.arange(n, dtype=np.uint32) * np.uint32(0x9E3779B9)
  x ^= x >> np.uint32(16)
  x *= np.uint32(0x85EBCA6B)
  x ^= x >> np.uint32(13)
  x *= np.uint32(0xC2B2AE35)
  x ^= x >> np.uint32(16)
  return x


def choose_tokens(
  candidates_bL: np.ndarray, counts_b: np.ndarray, keys_b: np.ndarray
) -> np.ndarray:
  """bool[b, L]: in each row `counts_b`, at least 1, of the candidates, all equally likely."""
  noise = bits(keys_b, candidates_bL.shape[1], stream=1)
  noise = np.where(candidates_bL, noise, np.uint32(0xFFFFFFFF))
  # In each row the numbers of these ranks come to lie where a sort would put them.
  ranked = np.partition(noise, np.unique(counts_b - 1), axis=1)
  last_b = ranked[np.arange(len(counts_b)), counts_b - 1]
  return (noise <= last_b[:, None]) & candidates_bL


def choose_words(
  candidates_bL: np.ndarray, counts_b: np.ndarray, starts_bL: np.ndarray, keys_b: np.ndarray
) -> np.ndarray:
  """bool[b, L]: whole words in random order as long as they fit into the count.

  starts_bL: True where a word begins; what follows it belongs to it up to the next start.
  """
  return _choose_groups(candidates_bL, counts_b, starts_bL, keys_b, lambda rng: 1)


def choose_spans(
  candidates_bL: np.ndarray, counts_b: np.ndarray, starts_bL: np.ndarray, keys_b: np.ndarray
) -> np.ndarray:
  """bool[b, L]: runs of whole words, geometric(0.2) and at most 10 long (Joshi et al., 2020)."""
  return _choose_groups(
    candidates_bL, counts_b, starts_bL, keys_b, lambda rng: min(rng.geometric(0.2), 10)
  )


def _choose_groups(
  candidates_bL: np.ndarray,
  counts_b: np.ndarray,
  starts_bL: np.ndarray,
  keys_b: np.ndarray,
  words_in_group: Callable[[np.random.Generator], int],
) -> np.ndarray:
  chosen = np.zeros_like(candidates_bL)
  for row, room in enumerate(counts_b.tolist()):
    rng = np.random.Generator(np.random.Philox(int(keys_b[row])))
    places = np.flatnonzero(candidates_bL[row])
    # A word also begins after a place that is no candidate, such as [SEP].
    begins = starts_bL[row, places] | (np.diff(places, prepend=-2) > 1)
    bounds = [*np.flatnonzero(begins).tolist(), len(places)]
    words, places, taken = len(bounds) - 1, places.tolist(), set()
    for first in rng.permutation(words).tolist():
      if room == 0:
        break
      last = min(first + words_in_group(rng), words)
      group = [p for p in places[bounds[first] : bounds[last]] if p not in taken]
      if len(group) <= room:
        taken.update(group)
        room -= len(group)
    chosen[row, list(taken)] = True
  return chosen


def gather_places(chosen_bL: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """(places int32[b, K], weights float32[b, K]) of what is chosen, in order; 0 and 0.0 fill up."""
  real = np.arange(k) < chosen_bL.sum(axis=1, keepdims=True)
  places = np.zeros(real.shape, np.int32)
  places[real] = np.flatnonzero(chosen_bL) % chosen_bL.shape[1]
  return places, real.astype(np.float32)


def replace(
  tokens_bL: np.ndarray,
  chosen_bL: np.ndarray,
  mask_id: int,
  ordinary: np.ndarray,
  shares: tuple[float, float],
  keys_b: np.ndarray,
) -> np.ndarray:
  """A copy of the tokens with each chosen one masked, made random, or left as it is.

  shares: of [MASK] and of a random id out of `ordinary`; the rest stays (0.8 and 0.1 in BERT).
  """
  flat = np.flatnonzero(chosen_bL)
  row, place = np.divmod(flat, chosen_bL.shape[1])
  noise = mix(mix(keys_b ^ np.uint64(2))[row] + place.astype(np.uint64) * GOLDEN)
  draw = (noise >> np.uint64(32)) / float(1 << 32)  # the other half of the bits draws the id
  random_ids = ordinary[noise.astype(np.uint32) % np.uint32(len(ordinary))]
  mask, random = shares
  result = tokens_bL.copy()
  new = np.where(draw < mask + random, random_ids, result.take(flat))
  result.put(flat, np.where(draw < mask, mask_id, new))
  return result
