"""Training: run() is the loop, make_step() the step, state.py what they work on."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax import config as config_lib
from lmjax import (
  experiment,
  fingerprint,
  generate,
  hardware,
  metrics,
  profiler,
  record,
  sharding,
  stopping,
)
from lmjax import workdir as workdir_lib
from lmjax.data import loader
from lmjax.errors import Restart, UserError
from lmjax.evaluate import Evaluator, check_best
from lmjax.experiment import Experiment
from lmjax.saving import Saving
from lmjax.state import TrainState, averaged, init_state, share_whole, warm_start

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
    Restart: the run was asked to stop, by a signal; what it has done is saved.
  """
  c = config_lib.resolve(config)
  path = experiment.run_path(workdir)
  window = profiler.Window(profile, path / 'profile', c['steps'])
  with stopping.Stop() as stop:
    finished = workdir_lib.check(path, c)
    if finished:
      print(f'{path} is finished: {metrics.line(finished["step"], finished["metrics"])}')
      return finished
    with workdir_lib.owned(path):
      return _run(c, path, window, stop)


def _run(
  c: Mapping[str, Any], path: epath.Path, window: profiler.Window, stop: stopping.Stop
) -> dict[str, Any]:
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
    share_whole(init_state(experiment.sketch(c), mesh)[0], mesh, c)
  digests = parts.digests
  if (path / 'record.json').exists():
    record.check_data(path, digests)
  check_best(parts)
  if c['log']['sample']:
    generate.encode_prompt(parts, c['log']['sample'])
  experiment.keep_programs(c)
  with jax.set_mesh(mesh), sharding.logical_axes(strategy):
    return _train(parts, mesh, path, digests, window, stop)


def _train(
  parts: Experiment,
  mesh: Mesh,
  path: epath.Path,
  digests: dict[str, str],
  window: profiler.Window,
  stop: stopping.Stop,
) -> dict[str, Any]:
  c, steps = parts.config, parts.config['steps']
  like, transform, make_state = init_state(parts, mesh)
  count = sum(x.size for x in jax.tree.leaves(like.params))
  whole = share_whole(like, mesh, c)
  print(f'{count:,} parameters, {whole:.1%} of them whole on each of {mesh.size} device(s)')
  rows = parts.rows(mesh)
  data = loader.Loader(parts.examples('train'), c['batch'], c['seed'], rows)

  def load(step):
    batch = data.batch(step)
    return loader.fingerprint(batch, rows), parts.place(batch, mesh)

  with contextlib.ExitStack() as stack:
    saving = stack.enter_context(Saving(path, c, digests))
    start, state, meta = saving.restore(like, data)
    if start:
      print(f'resuming at step {start} of {steps}', flush=True)
    else:
      state = warm_start(parts, mesh, make_state(), transform)
    workdir_lib.describe(parts, path, digests)
    eager = jax.config.jax_disable_jit
    step_fn = (
      make_step(parts, transform) if eager else _compile(lower(parts, mesh, like, transform))
    )
    stop.begin()  # CPUs give each other 30 s to meet, and only process 0 finds kept programs
    log = metrics.Log(path, start, steps, c['log'], _cost(parts, mesh), saving.steps, **meta)
    stack.enter_context(log)
    batches = stack.enter_context(contextlib.closing(loader.prefetch(load, start, steps)))
    stack.enter_context(window)
    watchdog = stack.enter_context(stopping.Watchdog())
    evaluator = Evaluator(parts, mesh)

    def is_due(what, step):
      return step == steps or step % c[what]['every'] == 0

    values = {}
    if start == steps or not meta['evaluated']:  # the last start has come so far
      values = evaluator(averaged(state), stop.tick)
      if values is None:
        raise _stopped(stop, start, steps)
      if not meta['evaluated']:
        log.write(start, values)

    running = None
    for step in range(start + 1, steps + 1):
      with log.waiting():
        digest, batch = next(batches)
      window.before(step)
      with watchdog.step():
        with jax.transfer_guard('allow' if eager else 'disallow'):
          state, numbers = step_fn(state, batch)
        # One step is computed and one waits for it: no process is further ahead of another.
        jax.block_until_ready(running)
        running = numbers
      window.after(step, numbers)
      log.push(step, digest, numbers)

      asked, evaluate, due = stop.tick(), is_due('evaluate', step), is_due('checkpoint', step)
      if evaluate or due or asked:
        # What is raised where the numbers are not finite keeps such a state from being saved.
        held = log.hold() if asked and not (evaluate or due) else log.flush()
        values = evaluator(averaged(state), stop.tick) if evaluate and not asked else {}
        asked = asked or values is None
        evaluated = not evaluate or bool(values)
        if evaluate and evaluated:
          log.write(step, values)
        if due or asked:
          meta = {'held': held or [], 'evaluated': evaluated}
          saving.save(step, state, meta, values or {}, last=asked or step == steps)
        if asked:
          raise _stopped(stop, step, steps)
        log.restart_clock()
    return _finish(parts, path, state, values)


def _cost(parts: Experiment, mesh: Mesh) -> dict[str, float]:
  """What a step costs and what there is to pay for it, for the log."""
  c = parts.config
  return {
    'tokens': c['batch'] * c['length'],
    'flops': parts.flops.model,
    'peak': hardware.peak_flops() * mesh.size,  # nan where nobody knows it
  }


def _stopped(stop: stopping.Stop, step: int, steps: int) -> Restart:
  return Restart(f'stopped by {stop.reason} after step {step} of {steps}, which is saved')


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  began = time.perf_counter()
  compiled = lowered.compile()
  print(f'compiled the step in {time.perf_counter() - began:.1f} s', flush=True)
  return compiled


def _finish(
  parts: Experiment, path: epath.Path, state: TrainState, values: dict[str, float]
) -> dict[str, Any]:
  """Writes result.json, by which a run is known to be finished."""
  result = {
    'step': parts.config['steps'],
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
    'metrics': values,
    'params_fingerprint': fingerprint.of_tree(state.params),
    'state_fingerprint': fingerprint.of_tree(state),
  }
  prompt = parts.config['log']['sample']
  if prompt:
    result['sample'] = generate.continue_text(parts, averaged(state), prompt)
    print(f'\n{result["sample"]}\n')
  metrics.write_json(path / 'result.json', result)
  return result
