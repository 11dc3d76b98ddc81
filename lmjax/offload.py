"""Copies of arrays in the memory of the hosts, so that the devices may go on.

One program sends all at once: every device what it holds, and of what several hold each a piece of
its own, so that no element travels twice and all links work.
"""

import functools
import math
import os

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def allow() -> None:
  """Lets GPUs copy more than XLA's 64 GiB at a time; to be called before a device is used."""
  os.environ.setdefault('XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB', str(1 << 20))


def copied(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """The arrays, on their way to the hosts; each process has a part, none may have all.

  The originals may be donated at once.
  """
  places = tuple(_apart(x).with_memory_kind('pinned_host') for x in arrays.values())
  with jax.disable_jit(False):
    found = _program(places)(tuple(arrays.values()))
  return dict(zip(arrays, found, strict=True))


@functools.cache
def _program(places: tuple[Sharding, ...]) -> jax.stages.Wrapped:
  return jax.jit(lambda arrays: arrays, out_shardings=places)


def _apart(x: jax.Array) -> Sharding:
  """A sharding in which replicas have pieces, as far as the shape divides: by its largest sides."""
  if not isinstance(x.sharding, NamedSharding):
    return x.sharding
  mesh, spec = x.sharding.mesh, [*x.sharding.spec, *(None,) * x.ndim][: x.ndim]
  parts = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]
  used = {axis for axes in parts for axis in axes}
  for axis, size in mesh.shape.items():
    ways = [math.prod(mesh.shape[a] for a in axes) * size for axes in parts]
    fits = [d for d in range(x.ndim) if axis not in used and x.shape[d] % ways[d] == 0]
    if fits:
      chosen = max(fits, key=lambda d: x.shape[d] // ways[d])
      parts[chosen] = (*parts[chosen], axis)
  return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in parts)))
