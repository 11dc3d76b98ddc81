"""Training: run() is the loop, make_step() the step, init_state() what they work on."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax import config as config_lib
from lmjax import (
  experiment,
  generate,
  hardware,
  metrics,
  optimizer,
  processes,
  profiler,
  record,
  sharding,
)
from lmjax import workdir as workdir_lib
from lmjax.checkpoint import Checkpoints
from lmjax.config import UserError
from lmjax.data import loader
from lmjax.evaluate import Evaluator, check_best, restore_params
from lmjax.experiment import Experiment


@flax.struct.dataclass
class TrainState:
  """All that a step changes; arrays only."""

  step: jax.Array  # int32, updates made
  params: Any
  opt_state: Any
  rng: jax.Array  # a key; the noise of a step is folded from it


# --------------------------------------------------------------------------------------- the step


def make_step(
  parts: Experiment, transform: optax.GradientTransformation
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
  """step(state, batch) -> (state, numbers): one update, for every objective."""
  model, micro_batches = parts.model, parts.config['micro_batches']
  schedule = parts.optimizer.schedule_fn(parts.config['steps'])

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
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    update = {'lr': schedule(state.step), 'grad_norm': optax.tree.norm(grads)}
    result = {'terms': terms, 'metrics': numbers, 'optimizer': update}
    return TrainState(state.step + 1, params, opt_state, state.rng), result

  return step


def init_state(parts: Experiment, mesh: Mesh) -> tuple[Any, optax.GradientTransformation, Callable]:
  """(shapes and places of the state, the optimizer's transform, what makes the state)."""
  c = parts.config
  boxed = parts.boxed_shapes()
  transform = parts.optimizer.transform(sharding.axis_names(boxed), c['steps'])
  batch, strategy = parts.abstract_batch(), c['sharding']['strategy']
  # What does not divide is said here, and not by a shard_map of the model.
  of_params = sharding.param_shardings(boxed, mesh, strategy)
  beside = sharding.param_shardings(boxed, mesh, strategy, of_state=True)

  def make() -> TrainState:
    rng, params_rng = jax.random.split(jax.random.key(c['seed']))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    params = nn.unbox(parts.init_params(params_rng, zeros))
    return TrainState(jnp.int32(0), params, transform.init(params), rng)

  shapes = jax.eval_shape(make)
  everywhere = NamedSharding(mesh, PartitionSpec())
  places = jax.tree.map(lambda _: everywhere, shapes)
  of_state = optimizer.shardings(shapes.opt_state, shapes.params, beside, everywhere)
  places = places.replace(params=of_params, opt_state=of_state)
  return sharding.placed(shapes, places), transform, jax.jit(make, out_shardings=places)


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


# --------------------------------------------------------------------------------------- the loop


def run(config: Mapping[str, Any], workdir: str | os.PathLike, profile: str = '') -> dict[str, Any]:
  """Trains, evaluates and saves the experiment in `workdir`, or goes on with it.

  `profile` is a window of steps like '10:15', whose trace is written to <workdir>/profile.
  With jax_disable_jit everything runs operation by operation, so that arrays can be looked at.

  Returns what result.json holds: step, parameters, metrics and, where asked for, a sample.

  Raises:
    UserError: a mistake in the config, or a workdir that holds another experiment.
    NonFinite: the loss or gradient is no longer finite; the checkpoints before it are kept.
  """
  c = config_lib.resolve(config)
  path = experiment.run_path(workdir)
  window = profiler.Window(profile, path / 'profile', c['steps'])
  finished = workdir_lib.check(path, c)
  if finished:
    print(f'{path} is finished: {metrics.line(finished["step"], finished["metrics"])}')
    return finished
  parts = experiment.prepare(c)
  if c['log']['sample']:
    generate.check_causal(parts)
  if c['init_from'] and not (path / 'config.json').exists():
    experiment.open_run(c['init_from'])
  mesh, strategy = sharding.make_mesh(c['sharding']), c['sharding']['strategy']
  sharding.check_mesh(mesh, strategy)
  sharding.check_batch(c, mesh)
  if jax.config.jax_disable_jit and 'tensor' in strategy and 1 < mesh.shape['model'] < mesh.size:
    raise UserError('--debug cannot leave a part of the devices to the compiler: sharding.data=1')
  if c['tokenizer'].get('vocab_size'):  # what cannot lie there: said before a tokenizer is made
    _share_whole(init_state(experiment.sketch(c), mesh)[0], mesh, c)
  digests = parts.digests
  if (path / 'record.json').exists():
    record.check_data(path, digests)
  check_best(parts)
  if c['log']['sample']:
    generate.encode_prompt(parts, c['log']['sample'])
  experiment.keep_programs(c)
  with jax.set_mesh(mesh), sharding.logical_axes(strategy):
    return _train(parts, mesh, path, digests, window)


def _train(
  parts: Experiment,
  mesh: Mesh,
  path: epath.Path,
  digests: dict[str, str],
  window: profiler.Window,
) -> dict[str, Any]:
  c, steps = parts.config, parts.config['steps']
  like, transform, make_state = init_state(parts, mesh)
  count = sum(x.size for x in jax.tree.leaves(like.params))
  whole = _share_whole(like, mesh, c)
  print(f'{count:,} parameters, {whole:.1%} of them whole on each of {mesh.size} device(s)')
  rows = parts.rows(mesh)
  data = loader.Loader(parts.examples('train'), c['batch'], c['seed'], rows)

  def saved():
    checkpoints.wait()
    return checkpoints.steps()

  def load(step):
    batch = data.batch(step)
    return loader.fingerprint(batch, rows), parts.place(batch, mesh)

  with contextlib.ExitStack() as stack:
    keep = {key: c['checkpoint'][key] for key in ('keep_last', 'keep_every', 'keep_best')}
    checkpoints = stack.enter_context(Checkpoints(path / 'checkpoints', **keep))
    restored = checkpoints.restore(like)
    start = restored[0] if restored else 0
    if restored:
      print(f'resuming at step {start} of {steps}', flush=True)
    state = restored[1] if restored else _warm_start(parts, mesh, make_state(), transform)
    workdir_lib.describe(parts, path, digests)
    eager = jax.config.jax_disable_jit
    step_fn = (
      make_step(parts, transform) if eager else _compile(lower(parts, mesh, like, transform))
    )
    processes.wait()  # CPUs give each other 30 s to meet, and only process 0 finds kept programs
    cost = {
      'tokens': c['batch'] * c['length'],
      'flops': parts.flops.model,
      'peak': hardware.peak_flops() * mesh.size,  # nan where nobody knows it
    }
    log = metrics.Log(path, start, steps, c['log'], cost, saved)
    stack.enter_context(log)
    batches = stack.enter_context(contextlib.closing(loader.prefetch(load, start, steps)))
    stack.enter_context(window)
    evaluator = Evaluator(parts, mesh)
    # A run killed after its last checkpoint has only this left to do.
    values = evaluator(_averaged(state)) if start == steps else {}

    for step in range(start + 1, steps + 1):
      with log.waiting():
        fingerprint, batch = next(batches)
      window.before(step)
      with jax.transfer_guard('allow' if eager else 'disallow'):
        state, numbers = step_fn(state, batch)
      window.after(step, numbers)
      log.push(step, fingerprint, numbers)

      evaluate, save = (
        step == steps or step % c[what]['every'] == 0 for what in ('evaluate', 'checkpoint')
      )
      if evaluate or save:
        log.flush()  # raises where the numbers are not finite: such a state is never saved
        values = evaluator(_averaged(state)) if evaluate else {}
        if evaluate:
          log.write(step, values)
        if save:
          checkpoints.save(step, state, {'step': step}, values)
        log.restart_clock()
    checkpoints.wait()
    return _finish(parts, path, state, values)


def _share_whole(like: TrainState, mesh: Mesh, config: Mapping[str, Any]) -> float:
  c = config['sharding']
  return sharding.unsharded(like.params, mesh, c['strategy'], c['max_unsharded'])


def _averaged(state: TrainState) -> Any:
  average = optimizer.averaged(state.opt_state)
  return state.params if average is None else average


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  began = time.perf_counter()
  compiled = lowered.compile()
  print(f'compiled the step in {time.perf_counter() - began:.1f} s', flush=True)
  return compiled


def _warm_start(
  parts: Experiment, mesh: Mesh, state: TrainState, transform: optax.GradientTransformation
) -> TrainState:
  """The fresh state, or one that begins with the parameters of the run that the config names."""
  source = parts.config['init_from']
  if not source:
    return state
  other = experiment.open_run(source)
  if other.tokenizer.fingerprint != parts.tokenizer.fingerprint:
    raise UserError(f'init_from = {source} was trained with another tokenizer')
  places = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  like = sharding.placed(state.params, places(state.params))
  _, params = restore_params(other, source, mesh, like=like)
  # Averages of parameters begin with these as well.
  opt_state = jax.jit(transform.init, out_shardings=places(state.opt_state))(params)
  return state.replace(params=params, opt_state=opt_state)


def _finish(
  parts: Experiment, path: epath.Path, state: TrainState, values: dict[str, float]
) -> dict[str, Any]:
  """Writes result.json, by which a run is known to be finished."""
  result = {
    'step': parts.config['steps'],
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
    'metrics': values,
  }
  prompt = parts.config['log']['sample']
  if prompt:
    result['sample'] = generate.continue_text(parts, _averaged(state), prompt)
    print(f'\n{result["sample"]}\n')
  metrics.write_json(path / 'result.json', result)
  return result
