"""batch(step): a pure function of the seed, the step and the token store.  And nothing to save."""

import functools
import hashlib
import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

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


class Rows(NamedTuple):
  """The rows of a global batch that a process makes."""

  numbers: np.ndarray  # int64[], ascending
  counted: np.ndarray  # bool[], whether it is the first of the processes that make this row


def all_rows(batch: int) -> Rows:
  return Rows(np.arange(batch, dtype=np.int64), np.ones(batch, bool))


@functools.lru_cache(8)
def rows_here(sharding: jax.sharding.Sharding, batch: int) -> Rows:
  """Those that a device of this process holds under the sharding of a batch's rows."""
  first = np.full(batch, np.iinfo(np.int64).max)
  here = np.zeros(batch, bool)
  for device, (rows,) in sharding.devices_indices_map((batch,)).items():
    first[rows] = np.minimum(first[rows], device.process_index)
    here[rows] |= device.process_index == jax.process_index()
  (numbers,) = np.nonzero(here)
  return Rows(numbers, first[numbers] == jax.process_index())


class Loader:
  """Batches of `examples`: every example once an epoch, in an order drawn anew for each epoch."""

  def __init__(self, examples: Examples, batch: int, seed: int, rows: Rows | None = None):
    """`rows`: those to make; by default all."""
    self.examples, self.size, self.seed = examples, batch, seed
    self.rows = all_rows(batch) if rows is None else rows

  def batch(self, step: int) -> Batch:
    """The rows of the global batch of a 0-based step, which is defined without processes."""
    n = len(self.examples)
    places = step * self.size + self.rows.numbers
    epochs = places // n
    seeds = np.array([epoch_key(self.seed, e) for e in epochs.tolist()], np.uint64)
    return self.examples(permute(places % n, n, seeds), epochs)


def eval_batches(
  examples: Examples, batch: int, limit: int = 0, rows: Rows | None = None
) -> Iterator[Batch]:
  """All examples in order, or the first `limit` batches; rows that only fill up weigh nothing.

  Of each batch `rows` are made; by default all.
  """
  n = len(examples)
  count = -(-n // batch)
  numbers = (all_rows(batch) if rows is None else rows).numbers
  for step in range(min(count, limit) if limit else count):
    indices = step * batch + numbers
    made = examples(np.minimum(indices, n - 1), np.zeros_like(indices))
    filler = indices >= n
    for key in made:
      if key.endswith('weights'):
        made[key][filler] = 0
    yield made


def fingerprint(batch: Batch, rows: Rows | None = None) -> int:
  """A 64-bit hash of a global batch: the sum over rows, so that processes can add up theirs."""
  total = 0
  names = sorted(batch)
  numbers, counted = rows or all_rows(len(batch[names[0]]))
  for place, (number, counts) in enumerate(zip(numbers.tolist(), counted.tolist(), strict=True)):
    if not counts:
      continue
    digest = hashlib.blake2b(str(number).encode(), digest_size=8)
    for name in names:
      digest.update(np.ascontiguousarray(batch[name][place]))
    total += int.from_bytes(digest.digest(), 'little')
  return total % (1 << 64)


def to_device(batch: Batch, size: int, shardings: Any) -> dict[str, jax.Array]:
  """Global arrays of `size` rows, of which `batch` has those of this process, in their order."""

  def place(x, sharding):
    numbers = rows_here(sharding, size).numbers

    def block(index):
      first, last = np.searchsorted(numbers, index[0].indices(size)[:2])
      return x[(slice(first, last), *index[1:])]

    return jax.make_array_from_callback((size, *x.shape[1:]), sharding, block)

  return jax.tree.map(place, batch, shardings)


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
