"""Training: run() is the loop; step.py has the step, state.py what they work on."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh

from lmjax import (
  check,
  experiment,
  fingerprint,
  generate,
  goodput,
  guard,
  hardware,
  jsonio,
  metrics,
  offload,
  profiler,
  record,
  sharding,
  stopping,
)
from lmjax import config as config_lib
from lmjax import workdir as workdir_lib
from lmjax.data import loader
from lmjax.errors import Restart, UserError
from lmjax.evaluate import Evaluator, check_best
from lmjax.experiment import Experiment
from lmjax.saving import Saving
from lmjax.state import TrainState, averaged, fresh, init_state, share_whole
from lmjax.step import lower, make_step
from lmjax.terminal import say


def run(config: Mapping[str, Any], workdir: str | os.PathLike, profile: str = '') -> dict[str, Any]:
  """Trains, evaluates and saves the experiment in `workdir`, or goes on with it.

  `profile` is a window of steps like '10:15', whose trace is written to <workdir>/profile.
  With jax_disable_jit everything runs operation by operation, so that arrays can be looked at.

  Returns what result.json holds: step, parameters, metrics and, where asked for, a sample.

  Raises:
    UserError: a mistake in the config, a workdir that holds another experiment, or one of which
      an oracle of lmjax.check does not hold.
    NonFinite: the loss or gradient is no longer finite; the checkpoints before it are kept.
    Restart: the run was asked to stop, by a signal; what it has done is saved.
  """
  offload.allow()
  c = config_lib.resolve(config)
  path = experiment.run_path(workdir)
  window = profiler.Window(profile, path / 'profile', c['steps'])
  with stopping.Stop() as stop:
    finished = workdir_lib.check(path, c)
    if finished:
      print(f'{path} is finished: {metrics.line(finished["step"], finished["metrics"])}')
      return finished
    with workdir_lib.owned(path), goodput.Clock(path) as clock:
      return _run(c, path, window, stop, clock)


def _run(
  c: Mapping[str, Any],
  path: epath.Path,
  window: profiler.Window,
  stop: stopping.Stop,
  clock: goodput.Clock,
) -> dict[str, Any]:
  parts, mesh, digests = prepared(c, path)
  with jax.set_mesh(mesh), sharding.logical_axes(c['sharding']['strategy']):
    while True:
      try:
        return _train(parts, mesh, path, digests, window, stop, clock)
      except guard.RollBack as e:
        say(str(e))


def prepared(c: Mapping[str, Any], path: epath.Path) -> tuple[Experiment, Mesh, dict[str, str]]:
  """The parts of a run in `path`, its mesh and its data's digests, once all is seen to fit."""
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
  for name in parts.stores:  # what is too short, or alone, is said before anything costs time
    parts.examples(name)
  check_best(parts)
  if c['log']['sample']:
    generate.encode_prompt(parts, c['log']['sample'])
  experiment.keep_programs(c)
  check.require(c, path)
  return parts, mesh, digests


def _train(
  parts: Experiment,
  mesh: Mesh,
  path: epath.Path,
  digests: dict[str, str],
  window: profiler.Window,
  stop: stopping.Stop,
  clock: goodput.Clock,
) -> dict[str, Any]:
  c, steps = parts.config, parts.config['steps']
  like, transform, make_state = init_state(parts, mesh)
  count, whole = sum(x.size for x in jax.tree.leaves(like.params)), share_whole(like, mesh, c)
  print(f'{count:,} parameters, {whole:.1%} of them whole on each of {mesh.size} device(s)')
  rows = parts.rows(mesh)
  data = loader.Loader(parts.examples('train'), c['batch'], c['seed'], rows)

  with contextlib.ExitStack() as stack:
    saving = stack.enter_context(Saving(path, c, digests))
    judge = guard.Guard(path, c, fingerprint.named(like.params), saving.steps)

    def load(step):
      batch = data.batch(judge.batch(step))
      return loader.fingerprint(batch, rows), parts.place(batch, mesh)

    start, state, meta = clock.timed('restore', saving.restore)(like, judge, lambda s: load(s)[0])
    clock.take_up(meta.pop('productive'))
    if start:
      print(f'resuming at step {start} of {steps}', flush=True)
    state = fresh(parts, mesh, like, transform, make_state) if state is None else state
    if not stop.begun:  # the run begins, or is taken up, and does not go back
      workdir_lib.describe(parts, path, digests, state.params, start)
    judge.begin()
    skipped, every = judge.skipped(), c['guard']['replicas']
    step_fn = clock.timed('compile', _step_fn)(parts, mesh, like, transform)
    stop.begin()  # CPUs give each other 30 s to meet, and only process 0 finds kept programs
    log = metrics.Log(path, start, steps, c['log'], cost(parts, mesh), judge.accepts, **meta)
    stack.enter_context(log)
    batches = stack.enter_context(contextlib.closing(loader.prefetch(load, start + 1, steps + 1)))
    stack.enter_context(window)
    watchdog = stack.enter_context(stopping.Watchdog())
    evaluator = clock.timed('evaluate', Evaluator(parts, mesh))
    stack.enter_context(clock.of('productive'))

    values = {}
    if start == steps or not meta['evaluated']:  # the last start has come so far
      values = evaluator(averaged(state), stop.tick)
      if values is None:
        raise stopped(stop, start, steps)
      if not meta['evaluated']:
        log.write(start, values)
    running = None
    for step in range(start + 1, steps + 1):
      watchdog.step()
      with log.waiting(), clock.of('input_wait'):
        digest, batch = next(batches)
      window.before(step)
      numbers = None
      if step not in skipped:
        state, numbers = step_fn(state, batch)
      jax.block_until_ready(running)  # no process is further ahead of another than one step
      running = numbers
      window.after(step, numbers)
      log.push(step, digest, numbers)

      asked, due = stop.tick(), step == steps or saving.due(step)
      evaluate = step == steps or step % c['evaluate']['every'] == 0
      if every and (due or asked or step % every == 0):
        guard.check_replicas(state)
      if evaluate or due or asked:
        # What is raised where the numbers are not finite keeps such a state from being saved.
        held = log.hold() if asked and not (evaluate or due) else log.flush()
        watchdog.rest()
        values = evaluator(averaged(state), stop.tick) if evaluate and not asked else {}
        asked = asked or values is None
        evaluated = not evaluate or bool(values)
        if evaluate and evaluated:
          log.write(step, values)
        if due or asked:
          judge.check_finite(step, state)
          meta = {'held': held or [], 'evaluated': evaluated, 'roll_backs': len(judge.roll_backs)}
          meta['productive'] = clock.mark()
          with clock.of('save_blocked'):
            log.sync()
            saving.save(step, state, meta, values or {}, last=asked or step == steps)
        if asked:
          raise stopped(stop, step, steps)
        log.restart_clock()
      if step % c['log']['every'] == 0:
        clock.write()
    return clock.timed('other', finish)(parts, path, state, values, judge.counts(), clock)


def cost(parts: Experiment, mesh: Mesh) -> dict[str, float]:
  """What a step costs and what there is to pay for it, for the log."""
  c = parts.config
  return {
    'tokens': c['batch'] * c['length'],
    'flops': parts.flops.model,
    'peak': hardware.peak_flops() * mesh.size,  # nan where nobody knows it
  }


def stopped(stop: stopping.Stop, step: int, steps: int) -> Restart:
  return Restart(f'stopped by {stop.reason} after step {step} of {steps}, which is saved')


def _step_fn(
  parts: Experiment, mesh: Mesh, like: TrainState, transform: optax.GradientTransformation
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
  if jax.config.jax_disable_jit:
    return make_step(parts, transform)
  compiled = _compile(lower(parts, mesh, like, transform))

  def step(state, batch):
    with jax.transfer_guard('disallow'):  # nothing goes to the host unseen
      return compiled(state, batch)

  return step


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  began = time.perf_counter()
  compiled = lowered.compile()
  print(f'compiled the step in {time.perf_counter() - began:.1f} s', flush=True)
  return compiled


def finish(
  parts: Experiment,
  path: epath.Path,
  state: TrainState,
  values: dict[str, float],
  decisions: dict[str, int],
  clock: goodput.Clock,
) -> dict[str, Any]:
  """Writes result.json, by which a run is known to be finished."""
  result = {
    'step': parts.config['steps'],
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
    'metrics': values,
    'decisions': decisions,
    'params_fingerprint': fingerprint.of_tree(state.params),
    'state_fingerprint': fingerprint.of_tree(state),
  }
  prompt = parts.config['log']['sample']
  if prompt:
    result['sample'] = generate.continue_text(parts, averaged(state), prompt)
    print(f'\n{result["sample"]}\n')
  result['goodput'] = clock.summary()
  jsonio.write(path / 'result.json', result)
  return result
