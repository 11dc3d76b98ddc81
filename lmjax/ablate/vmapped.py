"""Trains several seeds of an experiment in one compiled program; lmjax.ablate --vmap_seeds runs it:

python -m lmjax.ablate.vmapped --config FILE.py[:ARG] --seeds 0,1,2 --workdir DIR
python -m lmjax.ablate.vmapped … --seeds 0,1,2 --lr 0.001 --workdir DIR --lr 0.01 --workdir OTHER

A step of a small model leaves most of a device idle.  Five of them, vmapped, make 1.8 times as many
steps a second of dim 16 on two CPU cores, and 1.3 times of dim 64 (tests/benchmarks/vmapped.py).
Each seed has a directory DIR/SEED like a run of its own, with the batches, the noise and, up to
rounding, the numbers that it has alone; either may take up what the other began.
"""

import contextlib
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from lmjax import command, experiment, guard, offload, sharding, stopping, train
from lmjax import config as config_lib
from lmjax import workdir as workdir_lib
from lmjax.ablate.seed import Seed, check
from lmjax.data import loader
from lmjax.errors import NonFinite, UserError
from lmjax.evaluate import Evaluator
from lmjax.state import TrainState, averaged, init_state
from lmjax.step import make_step
from lmjax.terminal import say

Path = str | pathlib.Path


def run(
  config: Mapping[str, Any], seeds: Sequence[int], workdir: Path | Sequence[tuple[float, Path]]
) -> None:
  """Trains the seeds that are not finished, in `workdir`/<seed>.

  `workdir` may be pairs of a learning rate and its directory: then each seed is trained with each.
  A seed that its numbers stop is left out of what follows.  The oracles of lmjax.check are tried
  with the first seed.

  Raises:
    UserError: as lmjax.train.run, or they cannot be trained together.
    Restart: the process was asked to stop; what it has done is saved.
  """
  offload.allow()
  c = config_lib.resolve(config)
  check(c)
  whole = isinstance(workdir, str | os.PathLike)
  places = [(c['optimizer']['lr'], workdir)] if whole else workdir
  with stopping.Stop() as stop, contextlib.ExitStack() as held:
    todo = []
    for seed, (lr, where) in itertools.product(seeds, places):
      own = {**c, 'seed': seed, 'check': c['check'] and seed == seeds[0]}
      own['optimizer'] = {**c['optimizer'], 'lr': lr}
      path = experiment.run_path(pathlib.Path(where) / str(seed))
      if not workdir_lib.check(path, own) and not guard.stopped(path):
        held.enter_context(workdir_lib.owned(path))
        todo.append((own, path))
    found = [held.enter_context(Seed(*one, len(todo))) for one in todo]
    if not found:
      return
    mesh = found[0].mesh
    held.enter_context(jax.set_mesh(mesh))
    held.enter_context(sharding.logical_axes(c['sharding']['strategy']))
    like, _, _ = init_state(found[0].parts, mesh)
    at: dict[int, list[Seed]] = {}
    for one in found:  # a kill may have come between the saves of two
      at.setdefault(one.restore(like), []).append(one)
    for start, together in at.items():
      _train(_Group(start, together), stop)


class _Group:
  """Seeds that are at the same step, and their states in one."""

  def __init__(self, start: int, seeds: Sequence[Seed]):
    self.start, self.seeds, self.stopped = start, seeds, set()
    self.parts, self.config = seeds[0].parts, seeds[0].config
    mesh = seeds[0].mesh
    self.device = mesh.devices.flat[0]
    self.state = jax.tree.map(lambda *x: jnp.stack(x), *[seed.begin(start) for seed in seeds])
    peaks = jnp.array([seed.config['optimizer']['lr'] for seed in seeds], jnp.float32)
    with self.clocks('compile'):
      step = jax.jit(jax.vmap(self._update), donate_argnums=0)
      compiled = step.lower(self.state, self.batch(1)[1], peaks).compile()
    self.step = lambda state, batch: compiled(state, batch, peaks)
    over = lambda step: jax.jit(jax.vmap(step, in_axes=(0, None)))
    self._evaluator = Evaluator(self.parts, mesh, over)
    self._pending: list[tuple[int, list[int], Any]] = []

  def _update(self, state: TrainState, batch: Mapping[str, jax.Array], peak: jax.Array) -> Any:
    """A step of one seed, with this learning rate."""
    axes = sharding.axis_names(self.parts.boxed_shapes)
    transform = self.parts.optimizer.transform(axes, self.config['steps'], peak)
    return make_step(self.parts, transform, peak)(state, batch)

  def going(self) -> Iterator[tuple[int, Seed]]:
    """(place, seed) of those that nothing has stopped."""
    return ((i, seed) for i, seed in enumerate(self.seeds) if i not in self.stopped)

  def batch(self, step: int) -> tuple[list[int], dict[str, jax.Array]]:
    """(fingerprints, rows) of all seeds in a 1-based step."""
    rows = [seed.data.batch(step - 1) for seed in self.seeds]
    stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
    return [loader.fingerprint(x) for x in rows], jax.device_put(stacked, self.device)

  @contextlib.contextmanager
  def clocks(self, kind: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
      for seed in self.seeds:
        stack.enter_context(seed.clock.of(kind))
        if kind == 'input_wait':
          stack.enter_context(seed.log.waiting())
      yield

  def push(self, step: int, digests: list[int], numbers: Any) -> None:
    """Takes a step's numbers, still on the device."""
    self._pending.append((step, digests, numbers))

  def tell(self, hold: bool = False) -> dict[int, list[Any]]:
    """Each seed writes its numbers, or keeps those that are not due; what is kept, by place."""
    fetched = jax.device_get(self._pending)
    self._pending, held = [], {}
    for i, seed in self.going():
      with self._judged(i):
        for step, digests, numbers in fetched:
          seed.log.push(step, digests[i], _of(numbers, i))
        held[i] = seed.log.hold() if hold else seed.log.flush() or []
    return held

  def evaluate(self, stop: stopping.Stop) -> list[dict[str, float]] | None:
    """The numbers of every seed; None where it is to stop."""
    with self.clocks('evaluate'):
      sums = self._evaluator.sums(averaged(self.state), stop.tick)
      if sums is None:
        return None
      return [self._evaluator.values(_of(sums, i)) for i in range(len(self.seeds))]

  def save(self, step: int, meta: Mapping[str, Any], held: Mapping, values: list, last: bool):
    """Each seed saves its state, with the numbers that were found of it."""
    for i, seed in self.going():
      state = _of(self.state, i)
      with self._judged(i):
        seed.judge.check_finite(step, state)
        own = {**meta, 'held': held[i], 'roll_backs': 0, 'productive': seed.clock.mark()}
        with self.clocks('save_blocked'):
          seed.log.sync()
          seed.saving.save(step, state, own, values[i], last)

  @contextlib.contextmanager
  def _judged(self, i: int) -> Iterator[None]:
    """Where its numbers are such that it is to stop, this seed does, and no other."""
    try:
      yield
    except NonFinite as e:
      say(str(e))
      self.stopped.add(i)


def _of(stacked: Any, i: int) -> Any:
  """What the seed in this place has of arrays that all have together."""
  return jax.tree.map(lambda x: x[i], stacked)


def _train(group: _Group, stop: stopping.Stop) -> None:
  c, start, steps = group.config, group.start, group.config['steps']
  stop.begin()
  with contextlib.ExitStack() as stack:
    batches = stack.enter_context(
      contextlib.closing(loader.prefetch(group.batch, start + 1, steps + 1))
    )
    watchdog = stack.enter_context(stopping.Watchdog())
    stack.enter_context(group.clocks('productive'))
    values, running = None, None
    late = [seed for seed in group.seeds if not seed.meta['evaluated']]
    if start == steps or late:  # the last start has come so far
      values = group.evaluate(stop)
      if values is None:
        raise train.stopped(stop, start, steps)
      for seed, found in zip(group.seeds, values, strict=True):
        if seed in late:
          seed.log.write(start, found)
    for seed in group.seeds:
      seed.log.restart_clock()
    for step in range(start + 1, steps + 1):
      watchdog.step()
      with group.clocks('input_wait'):
        digests, batch = next(batches)
      group.state, numbers = group.step(group.state, batch)
      jax.block_until_ready(running)
      running = numbers
      group.push(step, digests, numbers)

      asked = stop.tick()
      due = step == steps or any(seed.saving.due(step) for _, seed in group.going())
      evaluate = step == steps or step % c['evaluate']['every'] == 0
      if evaluate or due or asked or step % c['log']['every'] == 0:
        held = group.tell(hold=asked and not (evaluate or due))
        if not held:  # all have been stopped
          return
        watchdog.rest()
        values = group.evaluate(stop) if evaluate and not asked else []
        asked = asked or values is None
        evaluated = not evaluate or bool(values and values[0])
        if evaluate and evaluated:
          for i, seed in group.going():
            seed.log.write(step, values[i])
        if due or asked:
          found = values or [{} for _ in group.seeds]
          group.save(step, {'evaluated': evaluated}, held, found, last=asked or step == steps)
        if asked:
          raise train.stopped(stop, step, steps)
        for seed in group.seeds:
          seed.clock.write()
          seed.log.restart_clock()
    for i, seed in group.going():
      path, counts = seed.path, seed.judge.counts()
      train.finish(seed.parts, path, _of(group.state, i), values[i], counts, seed.clock)


def main() -> None:
  f = flags.FLAGS
  if f.parent:
    command.end_with(f.parent)
  if not (f.config and f.seeds and f.workdir):
    raise UserError('name --config FILE.py[:ARGUMENT], --seeds N1,N2 and --workdir DIR')
  if not all(seed.isdecimal() for seed in f.seeds):
    raise UserError(f'--seeds={",".join(f.seeds)} are no numbers')
  if len(f.workdir) != max(1, len(f.lr)):
    raise UserError('name as many --workdir DIR as --lr, or one without')
  where = list(zip(f.lr, f.workdir, strict=True)) if f.lr else f.workdir[0]
  run(f.config, [int(seed) for seed in f.seeds], where)


if __name__ == '__main__':
  command.keep_freed_memory()
  config_flags.DEFINE_config_file('config', None, 'The experiment: FILE.py[:ARGUMENT].')
  flags.DEFINE_list('seeds', [], 'Those that are trained together.')
  flags.DEFINE_multi_string('workdir', [], 'Where each of them has a directory.')
  flags.DEFINE_multi_float('lr', [], 'In place of optimizer.lr, one for each --workdir.')
  flags.DEFINE_integer('parent', None, 'Stop, saved, when this process, which began it, is gone.')
  command.run(main)
