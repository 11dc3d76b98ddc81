"""The train step: what is differentiated, how it is added up, and what is changed by it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax import canonical, guard, sharding
from lmjax.experiment import Experiment
from lmjax.state import TrainState


def make_step(
  parts: Experiment, transform: optax.GradientTransformation, peak: jax.Array | None = None
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
  """step(state, batch) -> (state, numbers): one update, for every objective.

  `peak` is the learning rate that `transform` has in place of the config's.  The state remains as
  it is where the guard finds numbers that cannot be right.
  """
  gradients, options = _gradients(parts), parts.config['guard']
  schedule = parts.optimizer.schedule_fn(parts.config['steps'], peak)
  deviations = options['deviations'] if options['on_spike'] else math.inf

  def step(state, batch):
    rng = jax.random.fold_in(state.rng, state.step)
    grads, (terms, numbers) = gradients(state.params, batch, rng)
    weights = _positive({name: term.weight for name, term in terms.items()})
    loss = sum(term.total / weights[name] for name, term in terms.items())
    taken, norm, found = guard.judge(loss, grads, state.losses, state.step, deviations)
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    update = {'lr': schedule(state.step), 'grad_norm': norm}
    result = {'terms': terms, 'metrics': numbers, 'optimizer': update, 'guard': found}
    losses = state.losses.at[state.step % guard.WINDOW].set(loss)
    new = TrainState(state.step + 1, params, opt_state, None, losses)
    kept = jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, state.replace(rng=None))
    return kept.replace(rng=state.rng), result

  return step


def _gradients(parts: Experiment) -> Callable[[Any, dict, jax.Array], tuple[Any, tuple]]:
  """(parameters, batch, rng) -> (gradients, (loss terms, metrics)), of all rows of the batch."""
  model, micro_batches = parts.model, parts.config['micro_batches']

  def weights_of(params, batch):
    # Only the weights of this pass are used, so the compiler drops the rest of it.
    terms, _ = model.apply({'params': params}, batch, train=False)
    return {name: term.weight for name, term in terms.items()}

  def loss_fn(params, batch, rng, weights):
    terms, numbers = model.apply({'params': params}, batch, train=True, rngs={'dropout': rng})
    loss = sum(term.total / weights[name] for name, term in terms.items())
    return loss, (terms, numbers)

  grad_fn = jax.grad(loss_fn, has_aux=True)

  def of_part(index, rows, params, rng, weights):
    return grad_fn(params, rows, jax.random.fold_in(rng, index), weights)

  def canonical_gradients(params, batch, rng):
    total = functools.partial(canonical.total, parts.config['virtual_shards'], batch)
    weights = _positive(total(lambda _, rows, params: weights_of(params, rows), params))
    return total(of_part, params, rng, weights)

  def gradients(params, batch, rng):
    weights = _positive(weights_of(params, batch))
    if micro_batches == 1:
      return grad_fn(params, batch, rng, weights)

    def body(carry, part):
      return jax.tree.map(jnp.add, carry, of_part(*part, params, rng, weights)), None

    # Neighbouring rows go to different micro-batches, so that every device has a share of each.
    split = lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad_fn, params, batch, rng, weights))
    every = jnp.arange(micro_batches), jax.tree.map(split, batch)
    return jax.lax.scan(body, zeros, every)[0]

  return canonical_gradients if parts.config['deterministic_sum'] else gradients


def _positive(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: jnp.maximum(weight, 1e-6) for name, weight in weights.items()}


def lower(
  parts: Experiment, mesh: Mesh, like: TrainState, transform: optax.GradientTransformation
) -> jax.stages.Lowered:
  """The step for states like this one, which stay where they are, ready to be compiled."""
  batch = parts.abstract_batch()
  batch = sharding.placed(
    batch, sharding.batch_shardings(batch, mesh, parts.config['sharding']['strategy'])
  )
  # Left to itself the compiler would keep parameters where `zero` has the optimizer's state.
  places = jax.tree.map(lambda x: x.sharding, like), NamedSharding(mesh, PartitionSpec())
  step = jax.jit(make_step(parts, transform), donate_argnums=0, out_shardings=places)
  return step.lower(like, batch)
