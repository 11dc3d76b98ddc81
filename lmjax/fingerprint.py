"""A number that stands for the bits of an array, the same on any mesh and for any sharding.

Every element's bits are mixed with its place and summed modulo 2^32, twice over with other
constants.  Sums of integers depend on no order, and as the mixing is one to one, a change of any
single element cannot go unnoticed.  It is meant to find accidents, not attacks.  One pass over the
array, on the device where it is.
"""

import collections
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lmjax import processes

_LANES = ((0x9E3779B9, 0), (0x85EBCA6B, 0x165667B1))


def of(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
  """Name -> 16 hexadecimal digits."""
  return {name: digits(pair) for name, pair in each(_lanes, arrays).items()}


def each(
  program: Callable[[jax.Array], jax.Array], arrays: Mapping[str, jax.Array | np.ndarray]
) -> dict[str, np.ndarray]:
  """What a compiled program says of every array; arrays of one shape share a compilation."""
  found = {}
  # Programs even where --debug wants none: operation by operation it takes minutes.
  with jax.disable_jit(False):
    for name, x in arrays.items():
      found[name] = program(x)
      if jax.default_backend() == 'cpu':  # aborts when several with collectives are under way
        jax.block_until_ready(found[name])
  return jax.device_get(found)


def digits(lanes: Iterable[int]) -> str:
  return ''.join(f'{int(lane):08x}' for lane in lanes)


def together(fingerprints: Mapping[str, str]) -> str:
  """One fingerprint, 16 hexadecimal digits, for several with their names."""
  text = '\n'.join(f'{name} {fingerprints[name]}' for name in sorted(fingerprints))
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def lanes(x: jax.Array) -> jax.Array:
  """uint32[2]: both sums of an array of any type and shape; to be traced."""
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  width = min(4, x.dtype.itemsize)
  bits = lax.bitcast_convert_type(x, f'uint{8 * width}').astype(jnp.uint32)
  # The place counts modulo 2^32, in which two far elements of a large array may be alike.
  place = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    stride = jnp.uint32(math.prod(bits.shape[axis + 1 :]) % (1 << 32))
    place += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
  mixed = [_mix(bits ^ (place * jnp.uint32(by) + jnp.uint32(more))) for by, more in _LANES]
  return jnp.stack([jnp.sum(m, dtype=jnp.uint32) for m in mixed])


_lanes = jax.jit(lanes)


def disagreements(tree: Any) -> dict[str, list[int]]:
  """Name -> devices, of what should be the same on several devices and is not.

  A leaf's devices are those in the minority, or all that hold it where there is none.  The leaves
  lie on one mesh; every process makes the call, and hears of all devices.
  """
  held = {}
  for name, x in named(tree).items():
    places = {d: str(index) for d, index in x.sharding.devices_indices_map(x.shape).items()}
    if len(set(places.values())) < len(places):
      held[name] = x, {device.id: place for device, place in places.items()}
  if not held:
    return {}
  here: dict[int, list[list[int]]] = {}
  with jax.disable_jit(False):
    for x, _ in held.values():
      for shard in _by_device(x.sharding.mesh, x.sharding.spec, x).addressable_shards:
        here.setdefault(shard.device.id, []).append(np.asarray(shard.data)[0].tolist())
  everyone = {int(d): rows for part in processes.collect(here) or () for d, rows in part.items()}
  wrong = {}
  for i, (name, (_, places)) in enumerate(held.items()):
    copies: dict[str, dict[int, list[int]]] = {}
    for device, rows in everyone.items():
      copies.setdefault(places[device], {})[device] = rows[i]
    wrong[name] = sorted(device for copy in copies.values() for device in _minority(copy))
  return processes.share({name: devices for name, devices in wrong.items() if devices})


def _minority(values: dict[int, list[int]]) -> list[int]:
  counts = collections.Counter(map(tuple, values.values()))
  (usual, most), *others = counts.most_common()
  if not others:
    return []
  return [d for d, x in values.items() if tuple(x) != usual or most == others[0][1]]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_device(mesh: Mesh, spec: PartitionSpec, x: jax.Array) -> jax.Array:
  """uint32[devices, 2]: both sums of what each device holds of the array."""
  everywhere = PartitionSpec(mesh.axis_names)
  options = {'mesh': mesh, 'in_specs': spec, 'out_specs': everywhere, 'check_vma': False}
  return jax.shard_map(lambda part: lanes(part)[None], **options)(x)


def _mix(x: jax.Array) -> jax.Array:
  """The finalizer of MurmurHash3, by Austin Appleby, which is one to one."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def of_tree(tree: Any) -> str:
  """One fingerprint for all arrays of a tree, with their names."""
  return together(of(named(tree)))


def named(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by their paths, such as 'params/embed/table'."""
  leaves = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in leaves}
