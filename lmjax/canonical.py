"""A sum over the rows of a batch whose bits do not depend on how many devices computed it.

Additions of floats in another order give other bits, and so does a run that goes on with fewer
devices.  Here a batch is cut into a fixed number of virtual shards, a power of two.  Each of them
is computed by itself, and they are added up along one binary tree: its lower levels on each device,
the upper ones between devices that differ in one bit of their number (a butterfly), where both add
the same two numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmjax.errors import UserError
from lmjax.models import shards


def check(config: Mapping[str, Any]) -> None:
  """Raises a UserError where a config asks for such a sum and it cannot be."""
  count, strategy = config['virtual_shards'], config['sharding']['strategy']
  if not config['deterministic_sum']:
    if count != 8:
      raise UserError(f'virtual_shards = {count} is read by nothing without deterministic_sum')
  elif strategy != 'replicate' or config['micro_batches'] > 1:
    raise UserError(
      'deterministic_sum needs sharding.strategy = "replicate" and micro_batches = 1, not '
      f'"{strategy}" and {config["micro_batches"]}: virtual shards are computed one by one'
    )
  elif count & (count - 1) or config['batch'] % count:
    raise UserError(
      f'virtual_shards = {count} must be a power of two that divides batch = {config["batch"]}'
    )


def total(count: int, batch: Any, function: Callable, *others: Any) -> Any:
  """The sum of function(i, rows of the i-th virtual shard, *others) over `count` of them.

  `function` returns a pytree of arrays; `others` are whole on every device.
  """
  (axes,) = shards.rows(jax.tree.leaves(batch)[0].shape[:1])
  ways = shards.ways('batch') if axes else 1

  def on_device(batch, others):
    here = count // ways
    size = jax.tree.leaves(batch)[0].shape[0] // here
    first = here * jax.lax.axis_index(axes) if axes else 0
    # The loop turns once, which the compiler does not know, over rows of which it does not know
    # that they are all: so both remain, and what is in the loop is the same program, with the same
    # rounding, on any number of devices.  (Barriers are gone too early for that: XLA's CPU backend
    # in jaxlib 0.10.2.)
    once = jnp.where(jax.tree.leaves(batch)[0].ravel()[0].astype(jnp.float32) > -1e30, 1, 2)
    longer = jax.tree.map(lambda x: jnp.concatenate([x, x[:size]]), batch)

    def part(number):
      cut = lambda x: jax.lax.dynamic_slice_in_dim(x, number * size, size)
      return function(first + number, jax.tree.map(cut, longer), *others)

    def leaf(number):
      body = lambda i, sum_: _add(sum_, part(number + i))
      return jax.lax.fori_loop(0, once, body, _zeros(part, number))

    found = _tree(leaf, here, jnp.int32(0))
    for bit in (1 << i for i in range(ways.bit_length() - 1)):
      pairs = [(i, i ^ bit) for i in range(ways)]
      other = [jax.lax.ppermute(x, axes, pairs) for x in jax.tree.leaves(found)]
      found = _add(found, jax.tree.unflatten(jax.tree.structure(found), other))
    return found

  rows, everywhere = PartitionSpec(axes or None), PartitionSpec()
  return shards.on_rows(on_device, (axes,), (rows, everywhere), everywhere)(batch, others)


def _tree(leaf: Callable, count: int, first: jax.Array) -> Any:
  """leaf(first) + .. + leaf(first + count - 1), half by half; a loop, so that one is in memory."""
  if count == 1:
    return leaf(first)
  half = lambda i: _tree(leaf, count // 2, first + i * (count // 2))
  step = lambda sum_, i: (_add(sum_, half(i)), None)
  return jax.lax.scan(step, _zeros(half, jnp.int32(0)), jnp.arange(2, dtype=jnp.int32))[0]


def _add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)


def _zeros(function: Callable, *args: Any) -> Any:
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))
