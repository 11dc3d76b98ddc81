"""Plans a run for hardware that is not here: its real programs, compiled ahead of time and read."""

import collections
import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lmjax import config, evaluate, experiment, hardware, roofline, sharding, train
from lmjax.config import Overrides
from lmjax.errors import UserError
from lmjax.hlo import facts

GIB = hardware.GIB
# A flash kernel's backward pass: five products, one of them for the second time, where the forward
# pass has two (Dao, 2022).
BACKWARD = 2.5
# What a program has only where it has room.
UNKNOWN = ('dot_tflop', 'kernel_tflop', 'recomputation', 'hbm_gib', 'wire_gib', 'wire_gib_by_axis')
UNKNOWN += ('busy_seconds', 'step_seconds', 'bound_by', 'tokens_per_second', 'mfu')
UNKNOWN += ('hours', 'price', 'uncounted_loops')
Entry = dict[str, Any]
Array = tuple[float, str, str]  # bytes, dtype and shape of what one device has, where it is from


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """An experiment with overrides, to be planned for a topology."""

  spec: str
  overrides: Overrides
  topology: str
  price: float | None = None  # of a chip for an hour

  @property
  def command(self) -> str:
    spec, *rest = config.flags_of(self.spec, self.overrides)
    return ' '.join([spec.removeprefix('--config='), *rest])

  def but(self, overrides: Overrides) -> 'Job':
    return dataclasses.replace(self, overrides=self.overrides | overrides)


def jobs(
  specs: list[str], topologies: list[str], overrides: Overrides, sweep: bool, price: float | None
) -> Iterator[Job]:
  """Every experiment or arm on every topology, with what the experiment needs there.

  Raises:
    UserError: an experiment names no topology, and none is given.
  """
  for spec in specs:
    meant = config.declared(spec, 'TOPOLOGIES', {})
    if not (topologies or meant):
      raise UserError(f'{spec} names no hardware: say where with --topology')
    for arm in config.arms(spec) if sweep else [{}]:
      for topology in topologies or meant:
        yield Job(spec, meant.get(topology, {}) | arm | overrides, topology, price)


def plan(job: Job) -> Entry:
  """One element of the JSON, an object.  Sizes are GiB and FLOPs are TFLOP of a device and a step.

  `model_tflop` is what the mathematics asks for, without what the mask hides; `dot_tflop` is what
  the program's products do, and `kernel_tflop` what attention kernels do beside them for the places
  that the mask lets see (they skip whole blocks only).  Both over what they would be if no product
  were computed twice is `recomputation`; the optimizer's own products, as Muon has, are in it too.
  `wire_gib` is sent, as by rings.  `step_seconds` is the roofline's (see roofline.py); `hours` and
  `price` are of as many such steps as the run has, without evaluation.

  Raises:
    UserError: the experiment cannot run on the topology, or its compiler is not here.
  """
  parts, mesh = made(job)
  strategy = parts.config['sharding']['strategy']
  speech = contextlib.redirect_stdout(sys.stderr)  # such as which kernel it will be
  with speech, jax.set_mesh(mesh), sharding.logical_axes(strategy):
    like, transform, _ = train.init_state(parts, mesh)
    where = job.topology, parts.config['cache']
    step = facts.of(train.lower(parts, mesh, like, transform), *where, f'{job.command} to train')
    evaluation = None
    if step['fits']:
      lowered = evaluate.lower(parts, mesh, like.params)
      evaluation = facts.of(lowered, *where, f'{job.command} to evaluate')
  return _entry(job, parts, mesh, step, evaluation, like)


def made(job: Job) -> tuple[experiment.Experiment, Mesh]:
  """The experiment without its data, and the mesh that it asks for.

  Raises:
    UserError: it cannot run there.
  """
  c = config.resolve(config.load(job.spec, job.overrides))
  parts = experiment.sketch(c)
  mesh = sharding.make_mesh(c['sharding'], hardware.devices(job.topology))
  strategy, most = c['sharding']['strategy'], c['sharding']['max_unsharded']
  sharding.check_mesh(mesh, strategy)
  sharding.check_batch(c, mesh)
  with jax.set_mesh(mesh):  # for a kernel of its devices
    sharding.unsharded(parts.abstract_params(mesh), mesh, strategy, most)
  hardware.chip(job.topology)  # that it is known
  return parts, mesh


def _entry(
  job: Job,
  parts: experiment.Experiment,
  mesh: Mesh,
  step: facts.Facts,
  evaluation: facts.Facts | None,
  like: train.TrainState,
) -> Entry:
  chip, model = hardware.chip(job.topology), parts.flops.model / mesh.size
  held = list(_held(like))
  state = sum(size for size, _, _ in held)
  arguments = step.get('arguments', state)
  peaks = [
    f and kept + f.get('outputs', 0) + f['temporaries']
    for kept, f in ((arguments, step), (state, evaluation))
  ]
  memory = {'arguments': arguments, 'temporaries': step['temporaries'], 'peak': peaks[0]}
  memory |= {'evaluation': peaks[1], 'capacity': chip.memory}
  room = evaluation is not None and evaluation['fits'] and max(peaks) <= chip.memory
  entry = {
    'config': job.command,
    'topology': job.topology,
    'chip': dataclasses.asdict(chip),
    'fits': step['fits'] and room,
    'parameters': sum(math.prod(x.shape) for x in jax.tree.leaves(like.params)),
    'memory_gib': {key: size and size / GIB for key, size in memory.items()},
    'model_tflop': model / 1e12,
    **dict.fromkeys(UNKNOWN),
    'largest': _largest([*held, *step['largest']], like, step, parts.config),
    'compile_seconds': sum(f['compile_seconds'] for f in (step, evaluation) if f),
  }
  return entry | (_work(job, parts, mesh, step) if step['fits'] else {})


def _work(job: Job, parts: experiment.Experiment, mesh: Mesh, step: facts.Facts) -> Entry:
  """UNKNOWN, of a program that has room."""
  c, n, chip, flops = parts.config, mesh.size, hardware.chip(job.topology), parts.flops
  runs = step['kernel_runs']
  once = flops.seen * (1 + BACKWARD) / n if runs else 3 * flops.every / n
  kernels = flops.seen / n * (1 + step['kernel_runs_again'] / runs + BACKWARD) if runs else 0.0
  sent = [(size, group) for _, group, size in step['sent']]
  busy = roofline.seconds(step['dot_flops'] + kernels, step['moved'], sent, mesh, chip)
  seconds = max(busy.values())
  by_kind, by_axis = collections.Counter(), collections.Counter()
  for kind, group, size in step['sent']:
    if not size:  # among one device
      continue
    by_kind[kind] += size / GIB
    by_axis[roofline.axes(group, mesh)] += size / GIB
  hours = c['steps'] * seconds / 3600
  return {
    'uncounted_loops': step['uncounted_loops'],
    'dot_tflop': step['dot_flops'] / 1e12,
    'kernel_tflop': kernels / 1e12,
    'recomputation': (step['dot_flops'] + kernels) / (flops.dense / n + once),
    'hbm_gib': step['moved'] / GIB,
    'wire_gib': dict(by_kind),
    'wire_gib_by_axis': dict(by_axis),
    'busy_seconds': busy,
    'step_seconds': seconds,
    'bound_by': max(busy, key=busy.get),
    'tokens_per_second': c['batch'] * c['length'] / seconds,
    'mfu': flops.model / n / chip.flops / seconds,
    'hours': hours,
    'price': job.price and job.price * hours * n / chip.per_chip,
  }


def _held(like: train.TrainState) -> Iterator[Array]:
  """Of the state, what a device has of it."""
  short = {'float32': 'f32', 'bfloat16': 'bf16', 'int32': 's32'}
  for path, x in jax.tree_util.tree_flatten_with_path(like)[0]:
    shape = x.sharding.shard_shape(x.shape)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    size, dtype = math.prod(shape) * x.dtype.itemsize, x.dtype.name
    yield size, f'{short.get(dtype, dtype)}{list(shape)}', name


def _largest(
  arrays: Iterable[Array], like: train.TrainState, step: facts.Facts, c: Mapping[str, Any]
) -> list[Entry]:
  """With the key of the config that would shrink each."""
  whole = {str([*x.shape]) for x in jax.tree.leaves(like)}
  parts = {str([*x.sharding.shard_shape(x.shape)]) for x in jax.tree.leaves(like)}

  def shrinks(array: str, where: str) -> str:
    shape = array[array.index('[') :]
    if shape in whole and all(x.sharding.mesh.size == 1 for x in jax.tree.leaves(like)):
      return 'model.size'
    if shape in whole:  # a parameter, its gradient, or what the optimizer keeps for it
      return 'sharding.strategy'
    if shape in parts:
      return 'sharding.data'
    if f'{c["length"]}, {c["length"]}]' in array and not step['kernel_runs']:
      return 'model.attention'
    # What the layers' loop keeps is made in it, or called after the zeros that it was at first.
    kept = ('/while/' in where or 'broadcast' in where) and 'head.' not in where
    if kept and c['model']['remat'] != 'full':
      return 'model.remat'
    return 'micro_batches'

  return [
    {'gib': size / GIB, 'array': array, 'where': where, 'shrinks': shrinks(array, where)}
    for size, array, where in sorted(arrays, key=lambda one: -one[0])[:8]
  ]
