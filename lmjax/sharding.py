"""Where things lie: a strategy maps logical axes to mesh axes, and that is all there is to it.

* replicate: parameters whole on every device, each of which has its rows of the batch.
* zero: so, but the optimizer's state is sharded (Rajbhandari et al., 2020, stage 1).
* fsdp: parameters too, gathered where they are used (stage 3): one dimension over `data` and, where
  the mesh has it, another over `model`, which takes rows of the batch as well.
* tensor: products over `model` (Shoeybi et al., 2019), and what lies between the blocks by length
  (Korthikanti et al., 2022).
* fsdp+tensor: both, parameters in two dimensions.
* sequence: long rows over `sequence`, whose keys and values are gathered; parameters as in fsdp.

`replica` is the outermost axis, over slices that are joined by a slower network: rows of the batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmjax import processes
from lmjax.config import did_you_mean
from lmjax.errors import UserError

MESH_AXES = ('replica', 'data', 'sequence', 'model')
Rules = list[tuple[str, tuple[str, ...]]]

_ROWS = [('batch', ('replica', 'data'))]
_WIDE = [(axis, ('model',)) for axis in ('heads', 'mlp', 'vocab')]
# Not the heads: 25 of them divide by nothing.
_DEEP = [(axis, ('model',)) for axis in ('kv', 'mlp', 'vocab')]
_BETWEEN = [('residual_length', ('model',))]
_LONG = [(axis, ('sequence',)) for axis in ('length', 'residual_length')]

# strategy -> [(logical axis, mesh axes)].  One list serves parameters and activations: a mesh axis
# that a spec has used already is skipped.  What is not named is replicated.
RULES: dict[str, Rules] = {
  'replicate': _ROWS,
  'zero': _ROWS,
  'fsdp': [('batch', ('replica', 'data', 'model')), ('embed', ('data',)), *_DEEP],
  'tensor': [*_ROWS, *_BETWEEN, *_WIDE],
  'fsdp+tensor': [*_ROWS, *_BETWEEN, ('embed', ('data',)), *_WIDE],
  'sequence': [*_ROWS, *_LONG, ('embed', ('data', 'sequence'))],
}
# Where the optimizer's state lies, if not where the parameters do.
STATE_RULES: dict[str, Rules] = {'zero': [*_ROWS, ('embed', ('data',))]}


def mesh_of_run(config: Mapping[str, Any], boxed: Any) -> Mesh:
  """The mesh that a run was trained on, or as many devices along `data` as it divides over.

  Of several processes all have devices that take part.
  """
  sizes, strategy, devices = config['sharding'], config['sharding']['strategy'], jax.devices()
  if _fit([sizes[axis] or 1 for axis in MESH_AXES], len(devices)):
    return make_mesh(sizes)
  fewest = len(devices) if jax.process_count() > 1 else 1
  meshes = (make_mesh(None, devices[:n]) for n in range(len(devices), fewest, -1))
  fits = lambda mesh: (
    not (config['batch'] % _ways(mesh, strategy) or any(_misfits(boxed, mesh, rules(strategy))))
  )
  return next(filter(fits, meshes), make_mesh(None, devices[:fewest]))


def _fit(shape: list[int], count: int) -> list[int] | None:
  """The sizes with -1 filled in; None where they do not multiply to `count`."""
  known = math.prod(size for size in shape if size != -1)
  shape = [count // known if size == -1 else size for size in shape]
  return shape if math.prod(shape) == count else None


def make_mesh(
  sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """All devices in the order in which the inner axes have the fastest links.

  Args:
    sizes: of the mesh axes; one may be -1, for what the others leave.  By default the slices lie
      along `replica` and all else along `data`.
    devices: by default all there are.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  if devices is None:
    processes.check_joined()
    devices = jax.devices()
  # JAX also takes every host of CPUs or GPUs for a slice, by which all meshes may be cut.
  slices = len({getattr(d, 'slice_index', 0) for d in devices if d.platform == 'tpu'}) or 1
  said = {'replica': None, 'data': -1, **dict.fromkeys(MESH_AXES[2:], 1), **(sizes or {})}
  said = {axis: slices if said[axis] is None else said[axis] for axis in MESH_AXES}
  shape = list(said.values())
  if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
    raise UserError(f'sharding: sizes must be at least 1, or one of them -1 for the rest: {said}')
  shape = _fit(shape, len(devices))
  if not shape:
    sizes = ', '.join(f'{axis}={size}' for axis, size in said.items())
    raise UserError(f'sharding: {sizes} does not use the {len(devices)} device(s) there are')
  if shape[0] % slices:
    raise UserError(f'sharding.replica = {shape[0]} is no multiple of the {slices} slices')
  split = {'allow_split_physical_axes': True}  # 16 x 4 devices on a torus of 8 x 8
  if slices > 1:
    inner, outer = [shape[0] // slices, *shape[1:]], [slices, 1, 1, 1]
    array = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)
  else:
    array = mesh_utils.create_device_mesh(shape, devices, **split)
  types = (AxisType.Auto,) * len(shape)  # linen's gathers do not know the explicit ones
  return Mesh(array, MESH_AXES, axis_types=types)


def rules(strategy: str) -> Rules:
  if strategy not in RULES:
    known = did_you_mean(strategy, RULES)
    raise UserError(f'there is no sharding.strategy "{strategy}"{known}')
  return RULES[strategy]


def check_mesh(mesh: Mesh, strategy: str) -> None:
  """Devices along an axis that the strategy does not use would all do the same work."""
  used = {axis for _, axes in rules(strategy) for axis in axes}
  for axis, size in mesh.shape.items():
    if size > 1 and axis not in used:
      raise UserError(f'sharding.{axis} = {size}, but the strategy "{strategy}" uses no such axis')


def check_batch(config: Mapping[str, Any], mesh: Mesh) -> None:
  """Every device must get as many rows of every micro-batch as the others, and as much of each."""
  batch, micro_batches, length = (config[key] for key in ('batch', 'micro_batches', 'length'))
  strategy = config['sharding']['strategy']
  ways = _ways(mesh, strategy)
  if batch % (ways * micro_batches):
    unit = ways * micro_batches
    near = sorted({max(unit, batch // unit * unit), -(-batch // unit) * unit})
    micro = [n for n in range(1, micro_batches) if batch % (ways * n) == 0][-1:]
    raise UserError(
      f'batch = {batch} does not divide into {micro_batches} micro-batch(es) on {ways} device(s): '
      f'try {" or ".join(map(str, near))}' + ''.join(f', or micro_batches={n}' for n in micro)
    )
  if config['deterministic_sum'] and config['virtual_shards'] % ways:
    raise UserError(
      f'virtual_shards = {config["virtual_shards"]} do not divide over {ways} device(s): '
      'take a power of two of devices, and no more than virtual shards'
    )
  pieces = max(_ways(mesh, strategy, axis) for axis in ('length', 'residual_length'))
  if length % pieces:
    raise UserError(f'length = {length} does not divide over the {pieces} devices of a row')


def _ways(mesh: Mesh, strategy: str, axis: str = 'batch') -> int:
  return math.prod(mesh.shape[a] for a in dict(rules(strategy)).get(axis, ()))


def param_shardings(boxed: Any, mesh: Mesh, strategy: str, of_state: bool = False) -> Any:
  """A NamedSharding for each boxed (logically partitioned) parameter shape, or for its state.

  Raises:
    UserError: a dimension does not divide over the mesh axes that the strategy gives it.
  """
  chosen = STATE_RULES.get(strategy, rules(strategy)) if of_state else rules(strategy)
  for misfit in _misfits(boxed, mesh, chosen):
    raise UserError(misfit)
  return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, chosen)


def _misfits(boxed: Any, mesh: Mesh, chosen: Rules) -> Iterator[str]:
  """What of the parameters does not divide."""
  for path, box in jax.tree.leaves_with_path(boxed, is_leaf=_is_box):
    spec = nn.logical_to_mesh_axes(box.names, chosen)
    for name, size, axes in zip(box.names, box.value.shape, spec, strict=False):
      axes = (axes,) if isinstance(axes, str) else axes or ()
      ways = math.prod(mesh.shape[axis] for axis in axes)
      if size % ways:
        where = '.'.join(str(key.key) for key in path if hasattr(key, 'key'))
        yield (
          f'{where}: its dimension "{name}" of {size} does not divide over {ways} devices '
          f'(sharding.{", sharding.".join(axes)}): change the one or the other'
          f'{", or round it up with model.vocab_multiple" if name == "vocab" else ""}'
        )


def unsharded(params: Any, mesh: Mesh, strategy: str, most: float) -> float:
  """The share of the parameters (ShapeDtypeStructs with shardings) whole on every device.

  Raises:
    UserError: it exceeds `most` although the strategy shards parameters on this mesh.
  """
  sizes = np.array([x.size for x in jax.tree.leaves(params)])
  whole = np.array([x.sharding.is_fully_replicated for x in jax.tree.leaves(params)])
  share = float(sizes[whole].sum() / sizes.sum())
  axes = {axis for name, axes in rules(strategy) if name != 'batch' for axis in axes}
  if share > most and math.prod(mesh.shape[axis] for axis in axes) > 1:
    raise UserError(
      f'{share:.1%} of the parameters lie whole on every device under "{strategy}", more than '
      f'sharding.max_unsharded = {most}: shard more, or raise that'
    )
  return share


def placed(shapes: Any, places: Any) -> Any:
  """ShapeDtypeStructs with their places."""
  struct = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(struct, shapes, places)


def batch_shardings(batch: Any, mesh: Mesh, strategy: str) -> Any:
  """Rows over the mesh axes of `batch`; the other dimensions whole."""
  spec = PartitionSpec(dict(rules(strategy))['batch'])
  return jax.tree.map(lambda _: NamedSharding(mesh, spec), batch)


def axis_names(boxed: Any) -> Any:
  """The logical axis names of each parameter, as tuples, in the structure of the parameters."""
  return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=_is_box)


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.Partitioned)


def logical_axes(strategy: str) -> Any:
  """A context in which the models' logical axis names mean the strategy's mesh axes."""
  return nn.logical_axis_rules(rules(strategy))
