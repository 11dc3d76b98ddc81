"""batch(step): a pure function of the seed, the step and the token store.  And nothing to save."""

import hashlib
import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from lmjax.data.corrupt import GOLDEN, epoch_key, mix

Batch = dict[str, np.ndarray]

_HALF = np.array(32, np.uint64)


class Examples(Protocol):
  """What an objective makes of a store: `len` examples an epoch, and any rows of them."""

  def __len__(self) -> int: ...

  def __call__(self, indices: np.ndarray, epochs: np.ndarray) -> Batch: ...


def permute(indices: np.ndarray, size: int, seeds: np.ndarray) -> np.ndarray:
  """The places of `indices` under a pseudo-random permutation of range(size), one for each seed.

  A four-round Feistel network on the digits of a number system just large enough, walked until it
  falls into the range (Black & Rogaway, 2002): random access, and no table of the corpus's size.
  """
  high = math.isqrt(size - 1) + 1
  bases = (np.array(high, np.uint64), np.array(-(-size // high), np.uint64))
  result = indices.astype(np.uint64)
  outside = np.arange(len(result))
  while len(outside):
    digits, seed = list(np.divmod(result[outside], bases[1])), seeds[outside]
    for turn in range(4):
      this, other = turn % 2, 1 - turn % 2
      # Half of the bits leave room for the sum, which must not wrap around.
      noise = mix(seed + digits[other]) >> _HALF
      digits[this] = (digits[this] + noise) % bases[this]
      seed = seed + GOLDEN
    result[outside] = digits[0] * bases[1] + digits[1]
    outside = outside[result[outside] >= size]
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
    seeds = np.array([epoch_key(self.seed, e) for e in epochs.tolist()], np.uint64)
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
