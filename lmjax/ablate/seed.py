"""One of the runs that lmjax.ablate.vmapped trains together: its data, its files, its clock."""

import contextlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from lmjax import fingerprint, goodput, guard, metrics, train
from lmjax import workdir as workdir_lib
from lmjax.data import loader
from lmjax.errors import UserError
from lmjax.saving import Saving
from lmjax.state import TrainState, fresh, init_state


def check(config: Mapping[str, Any]) -> None:
  """Raises a UserError where seeds of this experiment cannot be trained together."""
  for key in ('on_bad', 'on_spike'):
    if (action := config['guard'][key]) not in ('stop', ''):
      raise UserError(f'guard.{key} = "{action}" is decided run by run: without --vmap')


class Seed(contextlib.ExitStack):
  """The run of one seed: what it is made of, and what is written of it."""

  def __init__(self, config: Mapping[str, Any], path: epath.Path, among: int):
    """`among` so many seeds the machine and its time are shared."""
    super().__init__()
    self.config, self.path, self.among = config, path, among
    self.clock = self.enter_context(goodput.Clock(path, among))
    self.parts, self.mesh, self._digests = train.prepared(config, path)
    if self.mesh.size > 1:
      raise UserError(
        f'seeds are trained together on one device, and here are {self.mesh.size}: '
        f'--parallel={self.mesh.size} lets arms share them'
      )
    self.data = loader.Loader(self.parts.examples('train'), config['batch'], config['seed'])
    self.saving = self.enter_context(Saving(path, config, self._digests))

  def restore(self, like: TrainState) -> int:
    """Takes up what is there; the step that it is at."""
    names = fingerprint.named(like.params)
    self.judge = guard.Guard(self.path, self.config, names, self.saving.steps)
    if any(self.judge.counts().values()):
      raise UserError(f'{self.path} has batches left out, and goes on alone: without --vmap')
    fetch = lambda step: loader.fingerprint(self.data.batch(step - 1))
    with self.clock.of('restore'):
      start, self.state, self.meta = self.saving.restore(like, self.judge, fetch)
    self.clock.take_up(self.meta.pop('productive'))
    return start

  def begin(self, start: int) -> TrainState:
    """Says what the run is, and opens what is written of it; the state that it goes on from."""
    c, state = self.config, self.state
    self.state = None
    if state is None:
      state = fresh(self.parts, self.mesh, *init_state(self.parts, self.mesh))
    described = self.parts, self.path, self._digests, state.params, start
    workdir_lib.describe(*described, among=self.among)
    cost = train.cost(self.parts, self.mesh)
    cost |= {key: self.among * cost[key] for key in ('tokens', 'flops')}
    told = {**self.meta, 'whose': f'lr {c["optimizer"]["lr"]:g} seed {c["seed"]}: '}
    log = metrics.Log(self.path, start, c['steps'], c['log'], cost, self.judge.accepts, **told)
    self.log = self.enter_context(log)
    return state
