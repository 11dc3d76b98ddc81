"""Code that runs on each device's rows, with parameters that are whole only while it runs.

Left to itself the compiler does worse than sharded parameters can: it reduces their gradients
whole, and in every turn of a loop (XLA in libtpu 0.0.42).  Here a parameter is gathered, and its
gradient scattered, one mesh axis after the other: libtpu has no reduce-scatter over two at once.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec

from lmjax.models import products

RING = 16  # devices; a longer one spans several dimensions of the torus, and takes its time
Rows = tuple[tuple[str, ...], ...]  # the mesh axes of the batch, and of the length


def spec(*names: str | None) -> PartitionSpec:
  """The mesh axes behind logical names, as the strategy's rules have it."""
  return nn.logical_to_mesh_axes(names)


def ways(*names: str) -> int:
  """Over how many devices logical axes lie."""
  return _size(axis for part in spec(*names) for axis in _axes(part))


def _size(axes: Iterable[str]) -> int:
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in axes)


def _axes(part: Any) -> tuple[str, ...]:
  """The mesh axes of one dimension of a spec, without those of one device."""
  mesh, part = jax.sharding.get_abstract_mesh(), (part,) if isinstance(part, str) else part or ()
  return tuple(axis for axis in part if mesh.shape.get(axis, 1) > 1)


def sharded() -> bool:
  """Whether devices with rows of their own have to gather parameters."""
  of = tuple(_axes(spec(name)[0]) for name in ('batch', 'length'))
  return any(places(('embed', 'kv', 'mlp', 'vocab'), of))


def rows(shape: tuple[int, ...]) -> Rows:
  """Where the rows of [B, L, ..] lie, in so far as each device has as many."""
  named = zip(('batch', 'length'), shape, strict=False)
  return tuple(_axes(spec(name)[0]) if size % ways(name) == 0 else () for name, size in named)


def places(names: tuple[str, ...], of: Rows) -> PartitionSpec:
  """How the mesh axes of the rows shard a parameter, too."""
  taken = sum(of, ())
  parts = (tuple(axis for axis in _axes(part) if axis in taken) for part in spec(*names))
  return PartitionSpec(*(axes or None for axes in parts))


def whole(part: jax.Array, where: PartitionSpec) -> jax.Array:
  """Inside on_rows: the parameter of which this is the device's part; gradients are scattered."""
  for dim, axes in enumerate(where):
    for axis in reversed(_axes(axes)):
      part = _gathered(part, axis, dim)
  return part


def _gathered(part: jax.Array, axis: str, dim: int) -> jax.Array:
  gather = lambda _, part: jax.lax.all_gather(part, axis, axis=dim, tiled=True)
  if products.platform() != 'tpu' or jax.lax.axis_size(axis) > RING:
    return gather(None, part)
  # Half of the parameters go round one way, half the other: links have both.
  scatter = lambda _, whole: ring_scatter(whole, axis, dim, step=-1 if dim else 1)
  return jax.custom_derivatives.linear_call(gather, scatter, None, part)


def ring_scatter(whole: jax.Array, axis: str, dim: int, step: int = 1) -> jax.Array:
  """The sum over a mesh axis, of which each device gets a part, from neighbour to neighbour.

  libtpu's own is a sum of the whole, twice as much to send, wherever parts are no whole tiles in
  the layout that it chose; and nothing else runs meanwhile, as it does beside permutations.
  """
  n, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  size = whole.shape[dim] // n
  part = lambda i: jax.lax.dynamic_slice_in_dim(whole, i % n * size, size, dim)
  sum_ = part(here - step)
  for behind in range(2, n + 1):
    sum_ = jax.lax.ppermute(sum_, axis, [(i, (i + step) % n) for i in range(n)])
    sum_ += part(here - behind * step)
  return sum_


def copies(table: jax.Array, names: tuple[str, ...], of: Rows) -> tuple[jax.Array, PartitionSpec]:
  """A whole table for each device that has rows, [devices, ..], and its places.

  So it is gathered once for all its uses, and the sum of their gradients scattered once.
  """
  where = places(names, of)
  spread = PartitionSpec(sum(map(_axes, where), ()) or None)
  return on_rows(lambda part: whole(part, where)[None], of, (where,), spread)(table), spread


def on_rows(function: Callable, of: Rows, in_specs: tuple, out_specs: Any) -> Callable:
  """The function, run on each device's rows; other mesh axes remain the compiler's."""
  mesh, taken = jax.sharding.get_abstract_mesh(), set(sum(of, ()))
  if not taken:
    return function
  # Axes of one device are nobody's.  Left to the compiler they cost it half again of the memory
  # traffic of a step: 136.8 instead of 92.2 GiB (GPT-2 small on v5e:4x4).
  taken |= {axis for axis in mesh.axis_names if mesh.shape[axis] == 1}
  rules = [
    (name, tuple(axis for axis in axes if axis not in taken))
    for name, axes in nn.get_logical_axis_rules()
  ]

  def inside(*args):
    with nn.logical_axis_rules(rules):
      return function(*args)

  specs = dict(in_specs=in_specs, out_specs=out_specs)
  return jax.shard_map(inside, axis_names=taken, check_vma=False, **specs)
