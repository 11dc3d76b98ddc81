"""What training works on: its arrays, their places on the mesh, and what they begin with."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax import experiment, guard, optimizer, sharding
from lmjax.errors import UserError
from lmjax.evaluate import restore_params
from lmjax.experiment import Experiment


@flax.struct.dataclass
class TrainState:
  """All that a step changes; arrays only."""

  step: jax.Array  # int32, updates made
  params: Any
  opt_state: Any
  rng: jax.Array  # a key; the noise of a step is folded from it
  losses: jax.Array  # float32[guard.WINDOW], those of the last updates, in a ring


def init_state(parts: Experiment, mesh: Mesh) -> tuple[Any, optax.GradientTransformation, Callable]:
  """(shapes and places of the state, the optimizer's transform, what makes the state)."""
  c = parts.config
  boxed = parts.boxed_shapes
  transform = parts.optimizer.transform(sharding.axis_names(boxed), c['steps'])
  batch, strategy = parts.abstract_batch(), c['sharding']['strategy']
  # What does not divide is said here, and not by a shard_map of the model.
  of_params = sharding.param_shardings(boxed, mesh, strategy)
  beside = sharding.param_shardings(boxed, mesh, strategy, of_state=True)

  def make(seed: jax.Array) -> TrainState:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    params_rng = jax.random.split(jax.random.key(seed))[1]
    return _begun(seed, nn.unbox(parts.init_params(params_rng, zeros)), transform)

  seed = np.uint32(c['seed'] % (1 << 32))  # data, so that one program begins all seeds
  shapes = jax.eval_shape(make, seed)
  everywhere = NamedSharding(mesh, PartitionSpec())
  places = jax.tree.map(lambda _: everywhere, shapes)
  of_state = optimizer.shardings(shapes.opt_state, shapes.params, beside, everywhere)
  places = places.replace(params=of_params, opt_state=of_state)
  begin = jax.jit(make, out_shardings=places)
  return sharding.placed(shapes, places), transform, lambda: begin(seed)


def _begun(seed: jax.Array, params: Any, transform: optax.GradientTransformation) -> TrainState:
  rng = jax.random.split(jax.random.key(seed))[0]
  losses = jnp.zeros(guard.WINDOW, jnp.float32)
  return TrainState(jnp.int32(0), params, transform.init(params), rng, losses)


def begin_with(
  params: Any, like: TrainState, seed: int, transform: optax.GradientTransformation
) -> TrainState:
  """The state of a run that begins with these parameters; it lies where `like` says."""
  begin = functools.partial(_begun, np.uint32(seed % (1 << 32)), transform=transform)
  places = jax.tree.map(lambda x: x.sharding, like)
  return jax.jit(begin, out_shardings=places)(jax.device_put(params, places.params))


def share_whole(like: TrainState, mesh: Mesh, config: Mapping[str, Any]) -> float:
  """The share of parameters that every device has whole; a UserError where it is too large."""
  c = config['sharding']
  return sharding.unsharded(like.params, mesh, c['strategy'], c['max_unsharded'])


def averaged(state: TrainState) -> Any:
  """The moving average of the parameters where the run keeps one, or else these."""
  average = optimizer.averaged(state.opt_state)
  return state.params if average is None else average


def fresh(
  parts: Experiment,
  mesh: Mesh,
  like: TrainState,
  transform: optax.GradientTransformation,
  make_state: Callable[[], TrainState],
) -> TrainState:
  """What a run begins with: what `make_state` makes, or the parameters of the run in init_from."""
  source = parts.config['init_from']
  if not source:
    return make_state()
  other = experiment.open_run(source)
  if other.tokenizer.fingerprint != parts.tokenizer.fingerprint:
    raise UserError(f'init_from = {source} was trained with another tokenizer')
  _, params = restore_params(other, source, mesh, like=like.params)
  return begin_with(params, like, parts.config['seed'], transform)
