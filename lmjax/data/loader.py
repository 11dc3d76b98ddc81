"""batch(step): a pure function of the seed, the step and the token store.  And nothing to save."""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from lmjax.data.corrupt import keys, mix

Batch = dict[str, np.ndarray]


class Examples(Protocol):
  """What an objective makes of a store: `len` examples an epoch, and any rows of them."""

  def __len__(self) -> int: ...

  def __call__(self, indices: np.ndarray, epochs: np.ndarray) -> Batch: ...


def permute(indices: np.ndarray, size: int, seeds: np.ndarray) -> np.ndarray:
  """The places of `indices` under a pseudo-random permutation of range(size), one for each seed.

  A four-round Feistel network over the next even power of two, walked until it falls into the range
  (Black & Rogaway, 2002): random access, and no table of the size of the corpus.
  """
  half = np.uint64(max(1, -(-int(size - 1).bit_length() // 2)))
  low = (np.uint64(1) << half) - np.uint64(1)
  result = indices.astype(np.uint64)
  outside = np.ones(len(result), bool)
  while outside.any():
    x, seed = result[outside], seeds[outside]
    left, right = x >> half, x & low
    for turn in range(4):
      left, right = right, left ^ (mix(seed + (right << np.uint64(3)) + np.uint64(turn)) & low)
    result[outside] = (left << half) | right
    outside = result >= size
  return result.astype(np.int64)


class Loader:
  """Batches of `examples`: every example once an epoch, in an order drawn anew for each epoch."""

  def __init__(self, examples: Examples, batch: int, seed: int):
    self.examples, self.size, self.seed = examples, batch, seed

  def batch(self, step: int) -> Batch:
    """The global batch of a 0-based step."""
    n = len(self.examples)
    places = step * self.size + np.arange(self.size, dtype=np.int64)
    epochs = places // n
    seeds = keys(self.seed, epochs, np.zeros_like(epochs))
    return self.examples(permute(places % n, n, seeds), epochs)


def eval_batches(examples: Examples, batch: int, limit: int = 0) -> Iterator[Batch]:
  """All examples in order, or the first `limit` batches; rows that only fill up weigh nothing."""
  n = len(examples)
  count = -(-n // batch)
  for step in range(min(count, limit) if limit else count):
    indices = step * batch + np.arange(batch, dtype=np.int64)
    rows = examples(np.minimum(indices, n - 1), np.zeros_like(indices))
    filler = indices >= n
    for key in rows:
      if key.endswith('weights'):
        rows[key][filler] = 0
    yield rows


def fingerprint(batch: Batch, first_row: int = 0) -> int:
  """A 64-bit hash of a global batch: the sum over rows, so that hosts can add up their slices."""
  total = 0
  names = sorted(batch)
  for row in range(len(batch[names[0]])):
    digest = hashlib.blake2b(str(first_row + row).encode(), digest_size=8)
    for name in names:
      digest.update(np.ascontiguousarray(batch[name][row]))
    total += int.from_bytes(digest.digest(), 'little')
  return total % (1 << 64)


def to_device(batch: Batch, shardings: Any) -> dict[str, jax.Array]:
  """Global arrays from this process's rows; the one function of data/ that touches JAX."""
  return jax.tree.map(jax.make_array_from_process_local_data, shardings, batch)


def prefetch(make: Callable[[int], Any], start: int, stop: int, depth: int = 2) -> Iterator[Any]:
  """make(start), make(start + 1), … computed ahead by a thread; its exceptions are raised here."""
  ready: queue.Queue = queue.Queue(depth)
  closed = threading.Event()

  def put(item):
    while not closed.is_set():
      try:
        ready.put(item, timeout=0.1)
        return
      except queue.Full:
        continue

  def work():
    try:
      for step in range(start, stop):
        put((make(step), None))
        if closed.is_set():
          return
    except BaseException as e:
      put((None, e))

  thread = threading.Thread(target=work, name='prefetch', daemon=True)
  thread.start()
  try:
    for _ in range(start, stop):
      item, error = ready.get()
      if error is not None:
        raise error
      yield item
  finally:
    closed.set()
    thread.join()
