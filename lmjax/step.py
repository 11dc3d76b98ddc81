"""The train step: what is differentiated, how it is added up, and what is changed by it."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax import guard, sharding
from lmjax.experiment import Experiment
from lmjax.state import TrainState


def make_step(
  parts: Experiment, transform: optax.GradientTransformation
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
  """step(state, batch) -> (state, numbers): one update, for every objective.

  The state remains as it is where the guard finds numbers that cannot be right.
  """
  model, micro_batches = parts.model, parts.config['micro_batches']
  schedule = parts.optimizer.schedule_fn(parts.config['steps'])
  options = parts.config['guard']
  deviations = options['deviations'] if options['on_spike'] else math.inf

  def loss_fn(params, batch, rng, weights):
    terms, numbers = model.apply({'params': params}, batch, train=True, rngs={'dropout': rng})
    loss = sum(term.total / weights[name] for name, term in terms.items())
    return loss, (terms, numbers)

  def gradients(params, batch, rng):
    # Only the weights of this pass are used, so the compiler drops the rest of it.
    terms, _ = model.apply({'params': params}, batch, train=False)
    weights = {name: jnp.maximum(term.weight, 1e-6) for name, term in terms.items()}
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if micro_batches == 1:
      return grad_fn(params, batch, rng, weights)

    def body(carry, part):
      index, rows = part
      return jax.tree.map(
        jnp.add, carry, grad_fn(params, rows, jax.random.fold_in(rng, index), weights)
      ), None

    # Neighbouring rows go to different micro-batches, so that every device has a share of each.
    split = lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)
    parts = (jnp.arange(micro_batches), jax.tree.map(split, batch))
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad_fn, params, batch, rng, weights))
    return jax.lax.scan(body, zeros, parts)[0]

  def step(state, batch):
    rng = jax.random.fold_in(state.rng, state.step)
    grads, (terms, numbers) = gradients(state.params, batch, rng)
    loss = sum(term.total / jnp.maximum(term.weight, 1e-6) for term in terms.values())
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
