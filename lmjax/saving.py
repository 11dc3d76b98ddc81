"""The checkpoints of a run: what identifies them, and which of them a run outlives."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from lmjax import guard, jsonio, metrics, processes, record, workdir
from lmjax.checkpoint import Checkpoints
from lmjax.errors import StorageError, UserError
from lmjax.terminal import say

FRESH = {'held': [], 'evaluated': True, 'productive': 0.0}  # see metrics.Log, goodput.Clock


class Saving(contextlib.AbstractContextManager):
  """Saves and takes up the run in a directory; every process makes the same calls."""

  def __init__(self, path: epath.Path, config: Mapping[str, Any], digests: Mapping[str, str]):
    c = config['checkpoint']
    keep = {key: c[key] for key in ('keep_last', 'keep_every', 'keep_best')}
    self._path, self._options, self._last = path, c, time.monotonic()
    self._looked_at = config['log']['every']
    self._about = {'config': config, 'data': digests}
    there = path / 'checkpoints'
    if not (path / 'config.json').exists() and there.exists() and any(there.iterdir()):
      raise UserError(f'{there} holds something, and {path} no run of ours: choose another workdir')
    self._checkpoints = Checkpoints(there, regular=c['every'], **keep)

  def __exit__(self, kind: object, *_: object) -> None:
    with _outlived('') if kind else contextlib.nullcontext():  # the first error is what is told
      self._checkpoints.close()

  def restore(
    self, like: Any, judge: guard.Guard, fetch: Callable[[int], int]
  ) -> tuple[int, Any, dict[str, Any]]:
    """(step, state, what log and clock need) of the newest checkpoint; (0, None, FRESH) without.

    Those that the run has gone back over are deleted. `fetch` gives the fingerprint of the rows
    that this process counts of a step's batch.

    Raises:
      StorageError: there is no room for checkpoints of this size, or none is whole.
      UserError: it is of other data, or the data are no longer those of the ledger.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
    there = len(self._checkpoints.steps())
    workdir.check_space(self._path, size, self._options['keep_last'] + 1 - there)
    self._checkpoints.delete(lambda step, meta: judge.outdated(step, meta.get('roll_backs', 0)))
    restored = self._checkpoints.restore(like)
    if restored is None:
      if not judge.roll_backs:
        self._check_new()
      return 0, None, dict(FRESH)
    step, state, meta = restored
    if lacking := {*FRESH, 'data', 'roll_backs'} - meta.keys():
      raise UserError(f'checkpoint {step} in {self._path} says nothing of {sorted(lacking)[0]}')
    record.check_same_data(self._checkpoints.directory, meta['data'], self._about['data'])
    if step:
      metrics.check_ledger(self._path, step, meta['held'], fetch(step))
    return step, state, {key: meta[key] for key in FRESH}

  def _check_new(self) -> None:
    """Raises a StorageError where a run that begins was so far that it has had checkpoints."""
    ledger, wrong = self._path / 'ledger.jsonl', ''
    if processes.index() == 0:
      last = max((line['step'] for line in jsonio.read_lines(ledger)), default=0)
      if last > 2 * self._options['every']:  # the first was waited for when the second was saved
        wrong = (
          f'the run in {self._path} has made {last} steps, and its checkpoints are gone: it does '
          f'not begin again in silence; remove {ledger} to begin it again'
        )
    if wrong := processes.share(wrong):
      raise StorageError(wrong)

  def due(self, step: int) -> bool:
    """Whether a step is to be saved, by its number or since time has passed."""
    if step % self._options['every'] == 0:
      return True
    timed = self._options['minutes'] > 0 and step % self._looked_at == 0
    seconds = time.monotonic() - self._last
    return timed and processes.share(seconds >= 60 * self._options['minutes'])

  def save(self, step: int, state: Any, meta: Mapping[str, Any], values: dict, last: bool) -> None:
    """Saves; one that cannot be written is outlived, unless it is the last that there will be.

    Raises:
      StorageError: the last one is not saved.
    """
    self._last = time.monotonic()
    with _outlived():
      self._checkpoints.wait()
    self._checkpoints.save(step, state, {**self._about, **meta}, values)
    if last:
      self._checkpoints.wait()

  def steps(self) -> list[int]:
    """Those that are committed when the one under way is."""
    with _outlived():
      self._checkpoints.wait()
    return self._checkpoints.steps()


@contextlib.contextmanager
def _outlived(then: str = '; training goes on') -> Iterator[None]:
  try:
    yield
  except StorageError as e:
    if processes.index() == 0:
      say(f'{e}{then}')
