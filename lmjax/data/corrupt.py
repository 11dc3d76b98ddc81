"""Masks and replacements in NumPy, each a function of a key and nothing else.

b rows, L length, K chosen places.  A row's key is a uint64 made from (seed, example,
epoch), so that its noise is the same on any number of hosts and after any restart.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ONE, _TWO = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of SplitMix64 (Steele et al., 2014): a bijection of uint64 that looks random."""
  x = (x ^ (x >> np.uint64(30))) * _ONE
  x = (x ^ (x >> np.uint64(27))) * _TWO
  return x ^ (x >> np.uint64(31))


def keys(seed: int, indices: np.ndarray, epochs: np.ndarray) -> np.ndarray:
  """uint64[b] from a seed and, for each row, its example and epoch."""
  key = mix(np.full(len(indices), seed, np.uint64) + _GOLDEN)
  for part in (indices, epochs):
    key = mix(key + _GOLDEN * (part.astype(np.uint64) + np.uint64(1)))
  return key


def bits(keys_b: np.ndarray, n: int, stream: int) -> np.ndarray:
  """uint32[b, n], independent for each key and stream."""
  start = mix(keys_b ^ np.uint64(stream))[:, None]
  counter = np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN
  return (mix(start + counter[None]) >> np.uint64(32)).astype(np.uint32)


def choose_tokens(
  candidates_bL: np.ndarray, counts_b: np.ndarray, k: int, keys_b: np.ndarray
) -> np.ndarray:
  """bool[b, L]: in each row `counts_b` (at most k) of the candidates, all equally likely."""
  length = candidates_bL.shape[1]
  # The last bit goes to the candidates, so that whatever is none of them sorts behind.
  noise = bits(keys_b, length, stream=1) >> np.uint32(1)
  noise[~candidates_bL] |= np.uint32(1 << 31)
  k = min(k, length)
  nearest = np.argpartition(noise, k - 1, axis=1)[:, :k]
  order = np.argsort(np.take_along_axis(noise, nearest, axis=1), axis=1)
  ranked = np.take_along_axis(nearest, order, axis=1)
  chosen = np.zeros_like(candidates_bL)
  np.put_along_axis(chosen, ranked, np.arange(k) < counts_b[:, None], axis=1)
  return chosen & candidates_bL


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


def _choose_groups(candidates_bL, counts_b, starts_bL, keys_b, words_in_group) -> np.ndarray:
  chosen = np.zeros_like(candidates_bL)
  for row, count in enumerate(counts_b.tolist()):
    rng = np.random.Generator(np.random.Philox(int(keys_b[row])))
    places = np.flatnonzero(candidates_bL[row])
    # A word also begins after a place that is no candidate, such as [SEP].
    begins = starts_bL[row, places] | (np.diff(places, prepend=-2) > 1)
    words = np.split(places, np.flatnonzero(begins)[1:])
    room = count
    for first in rng.permutation(len(words)).tolist():
      if room == 0:
        break
      group = np.concatenate(words[first : first + words_in_group(rng)])
      group = group[~chosen[row, group]]
      if 0 < len(group) <= room:
        chosen[row, group] = True
        room -= len(group)
  return chosen


def gather_places(chosen_bL: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """(places int32[b, K], weights float32[b, K]) of what is chosen, in order; 0 and 0.0 fill up."""
  order = np.argsort(~chosen_bL, axis=1, kind='stable')[:, :k]
  count = chosen_bL.sum(axis=1, keepdims=True)
  real = np.arange(k) < count
  if order.shape[1] < k:
    order = np.pad(order, ((0, 0), (0, k - order.shape[1])))
  return np.where(real, order, 0).astype(np.int32), real.astype(np.float32)


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
  counts = chosen_bL.sum(axis=1, keepdims=True)
  k = int(counts.max(initial=0))
  real = np.arange(k) < counts  # the chosen of a row, in order, draw the row's first numbers
  draw = (bits(keys_b, k, stream=2) / np.float64(1 << 32))[real]
  random_ids = ordinary[bits(keys_b, k, stream=3)[real] % np.uint32(len(ordinary))]
  mask, random = shares
  old = tokens_bL[chosen_bL]
  result = tokens_bL.copy()
  result[chosen_bL] = np.where(
    draw < mask, mask_id, np.where(draw < mask + random, random_ids, old)
  )
  return result
