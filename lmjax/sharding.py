"""Where things lie: a strategy maps logical axes to mesh axes, and that is all there is to it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmjax.config import UserError, did_you_mean

MESH_AXES = ('replica', 'data', 'sequence', 'model')

# strategy -> [(logical axis, mesh axes)].  One list serves parameters and activations: a mesh axis
# that a spec has used already is skipped.  What is not named is replicated.
RULES: dict[str, list[tuple[str, tuple[str, ...]]]] = {
  'replicate': [('batch', ('replica', 'data'))],
}


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The devices, by default all there are, along `data`."""
  shape = (1, len(devices or jax.devices()), 1, 1)
  types = (AxisType.Auto,) * len(shape)  # linen's gathers do not know the explicit ones
  return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)


def rules(strategy: str) -> list[tuple[str, tuple[str, ...]]]:
  if strategy not in RULES:
    known = did_you_mean(strategy, RULES)
    raise UserError(f'there is no sharding.strategy "{strategy}"{known}')
  return RULES[strategy]


def check_batch(batch: int, micro_batches: int, mesh: Mesh, strategy: str) -> None:
  """Every device must get the same number of rows of every micro-batch."""
  ways = math.prod(mesh.shape[a] for a in dict(rules(strategy))['batch'])
  if batch % (ways * micro_batches):
    unit = ways * micro_batches
    near = sorted({max(unit, batch // unit * unit), -(-batch // unit) * unit})
    raise UserError(
      f'batch = {batch} does not divide into {micro_batches} micro-batch(es) on {ways} device(s): '
      f'try {" or ".join(map(str, near))}'
    )


def param_shardings(boxed: Any, mesh: Mesh, strategy: str) -> Any:
  """A NamedSharding for each boxed (logically partitioned) parameter shape."""
  specs = nn.get_partition_spec(boxed)
  return nn.logical_to_mesh_sharding(specs, mesh, rules(strategy))


def batch_shardings(batch: Any, mesh: Mesh, strategy: str) -> Any:
  """Rows over the mesh axes of `batch`; the other dimensions whole."""
  spec = PartitionSpec(dict(rules(strategy))['batch'])
  return jax.tree.map(lambda _: NamedSharding(mesh, spec), batch)


def axis_names(boxed: Any) -> Any:
  """The logical axis names of each parameter, as tuples, in the structure of the parameters."""
  is_box = lambda x: isinstance(x, nn.Partitioned)
  return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def logical_axes(strategy: str) -> Any:
  """A context in which the models' logical axis names mean the strategy's mesh axes."""
  return nn.logical_axis_rules(rules(strategy))
