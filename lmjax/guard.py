"""Steps whose numbers cannot be right: they change nothing, and what is done then is written down.

`judge` is a part of the compiled step: where the loss or the gradient is not finite, or the loss a
spike, the step leaves the state as it was.  The host hears of it when numbers are fetched, and the
config says what comes of it: to stop, to skip the batch, or to go back to the last checkpoint and
on with the batches behind the bad one, as PaLM's authors did by hand (Chowdhery et al. 2204.02311).

Every decision is a line of events.jsonl, and from then on a fact: a run that is taken up again, or
that replays the file of another, does as it says without asking again, so that a fault that does
not come twice changes no bit.
"""

import collections
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from lmjax import fingerprint, jsonio, processes
from lmjax.errors import NonFinite, Restart, UserError
from lmjax.terminal import say

ACTIONS = ('stop', 'skip', 'roll_back')
WINDOW = 128  # accepted losses that a spike is measured by; none is found before there are so many


class RollBack(Exception):
  """The run is to be taken up again from its last checkpoint, as the events now say."""


def judge(
  loss: jax.Array, grads: Any, losses: jax.Array, count: jax.Array, deviations: float
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """(whether the step is to be taken, the norm of the gradient, what `Guard.accepts` looks at).

  `losses` are the last WINDOW ones of `count` steps that were taken.  A loss more than so many
  standard deviations above their mean is a spike; infinity finds none.
  """
  squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grads)]
  norm = jnp.sqrt(sum(squares))
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  limit = losses.mean() + deviations * losses.std()
  spike = finite & (count >= WINDOW) & (loss > limit)
  taken = finite & ~spike
  found = {'taken': taken, 'spike': spike, 'loss': loss, 'limit': limit}
  found['squares'] = jnp.stack(squares)
  return taken, norm, found


def check(config: Mapping[str, Any]) -> None:
  """Raises a UserError where the section `guard` of a config says nothing that can be done."""
  c = config['guard']
  for key, known in (('on_bad', ACTIONS), ('on_spike', ('', *ACTIONS))):
    if c[key] not in known:
      raise UserError(f'guard.{key} = "{c[key]}" is none of {", ".join(known)}')
  if c['deviations'] <= 0:
    raise UserError(f'guard.deviations = {c["deviations"]} must be above 0')


def check_replicas(state: Any) -> None:
  """Raises Restart where devices that should hold the same do not: one of them has erred."""
  if wrong := fingerprint.disagreements(state):
    devices = sorted({device for found in wrong.values() for device in found})
    raise Restart(
      f'the replicas of {_some(list(wrong))} differ (on devices {devices}): a device has erred; '
      'start the run again, without that device if it errs again'
    )


def stopped(path: epath.Path) -> str:
  """Why the numbers of the run in `path` have stopped it; '' where they have not."""
  events, there = list(jsonio.read_lines(path / 'events.jsonl')), path / 'checkpoints'
  if not events or events[-1]['event'] != 'stop':
    return ''
  step, names = events[-1]['step'], [x.name for x in there.iterdir()] if there.exists() else []
  later = any(name.isdecimal() and int(name) >= step for name in names)  # it has gone on since
  return '' if later else f'step {step}: {events[-1]["why"]}'


class Guard:
  """The decisions of a run; of several processes all take the same, and process 0 writes them.

  Args:
    path: the directory of the run, whose events.jsonl is obeyed and added to.
    config: that of the run.
    names: of the parameters, in the order of their gradients.
    saved: says which steps have a checkpoint.
  """

  def __init__(
    self,
    path: epath.Path,
    config: Mapping[str, Any],
    names: Iterable[str],
    saved: Callable[[], list[int]],
  ):
    self._path, self._options, self._names = path, config['guard'], list(names)
    self._checkpoint, self._saved = config['checkpoint'], saved
    self._file = path / 'events.jsonl'
    self._events = processes.share(self._read() if processes.index() == 0 else None)
    self._history: collections.deque[float] = collections.deque(maxlen=5)

  def _read(self) -> list[dict[str, Any]]:
    file = self._file
    if not file.exists() and self._options['replay']:
      file = epath.Path(self._options['replay']).expanduser()
      if not file.exists():
        raise UserError(f'guard.replay = {file}: there is no such file')
    events = list(jsonio.read_lines(file))
    try:
      for event in events:
        to = event['to'] if event['event'] == 'roll_back' else 0
        numbers = to, event['step'], event['batch']
        good = all(isinstance(n, int) and 0 <= n < 1 << 62 for n in numbers) and to < event['step']
        if event['event'] not in ACTIONS or not good:
          raise ValueError(event)
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(f'{file} is no log of events: {e}') from e
    replayed = file != self._file  # where the other has stopped, this one may not have come to
    return [event for event in events if not (replayed and event['event'] == 'stop')]

  def begin(self) -> None:
    """Keeps what is replayed."""
    if self._events and processes.index() == 0 and not self._file.exists():
      say(f'{len(self._events)} decisions of {self._options["replay"]} hold here too')
    self._write()

  @property
  def roll_backs(self) -> list[dict[str, Any]]:
    return [event for event in self._events if event['event'] == 'roll_back']

  def batch(self, step: int) -> int:
    """The 0-based batch of a 1-based step: behind all that the run has rolled back over."""
    events = self.roll_backs
    for i in reversed(range(len(events))):
      if events[i]['to'] < step:
        return max(event['batch'] for event in events[: i + 1]) + step - events[i]['to']
    return step - 1

  def skipped(self) -> set[int]:
    """The steps that are not made."""
    steps: set[int] = set()
    for event in self._events:
      if event['event'] == 'skip':
        steps.add(event['step'])
      if event['event'] == 'roll_back':
        steps = {step for step in steps if step <= event['to']}
    return steps

  def counts(self) -> dict[str, int]:
    """'skip' and 'roll_back' -> how often it was decided."""
    events = [event['event'] for event in self._events]
    return {action: events.count(action) for action in ACTIONS if action != 'stop'}

  def outdated(self, step: int, known: int) -> bool:
    """Whether the run has gone back over a checkpoint that was written after `known` roll-backs."""
    return any(event['to'] < step for event in self.roll_backs[known:])

  def accepts(self, step: int, found: Mapping[str, Any]) -> bool:
    """What `judge` has found; False where the step has changed nothing.

    Raises:
      NonFinite: the run is to stop.
      RollBack: it is to be taken up again.
    """
    loss = float(found['loss'])
    if found['taken']:
      self._history.append(loss)
      return True
    before = ', '.join(f'{x:.4g}' for x in self._history) or 'none'
    why = f'the loss is {loss:.6g}'
    if found['spike']:
      n = self._options['deviations']
      why += f', above {found["limit"]:.6g} ({n:g} deviations above the mean of the last {WINDOW})'
    why += f'; the losses before it were {before}'
    bad = [
      name for name, x in zip(self._names, found['squares'], strict=True) if not math.isfinite(x)
    ]
    if bad:
      why += f'; not finite is the gradient of {_some(bad)}'
    self._decide(self._options['on_spike' if found['spike'] else 'on_bad'], step, why)
    return False

  def check_finite(self, step: int, state: Any) -> None:
    """Keeps a state from being saved, and raises as `accepts` does: an update may overflow too."""
    named = fingerprint.named(state).items()
    real = {name: x for name, x in named if jnp.issubdtype(x.dtype, jnp.inexact)}
    finite = fingerprint.each(_is_finite, real)
    if wrong := [name for name, is_finite in finite.items() if not is_finite]:
      action = 'stop' if self._options['on_bad'] == 'skip' else self._options['on_bad']
      self._decide(action, step, f'not finite is {_some(wrong)}')

  def _decide(self, action: str, step: int, why: str) -> None:
    decided = sum(event['event'] != 'stop' for event in self._events)
    if action != 'stop' and decided >= self._options['limit']:
      action, why = 'stop', f'{why}; guard.limit = {decided} are decided already'
    event = {'event': action, 'step': step, 'batch': self.batch(step), 'why': why}
    saved = [s for s in self._saved() if s < step]
    if action == 'roll_back':
      # Where the last one is that there is in any case: nothing that a run computes shall depend
      # on when somebody has asked it to stop.
      every, newest = self._checkpoint['every'], max(saved, default=0)
      regular = (step - 1) // every * every
      timed = self._checkpoint['minutes'] > 0
      event['to'] = newest if timed or regular not in (0, *saved) else regular
    self._events.append(event)
    self._write()
    if action == 'stop':
      kept = f'checkpoint {saved[-1]} is the last good one' if saved else 'no checkpoint was saved'
      raise NonFinite(f'step {step}: {why}; {kept} in {self._path}')
    if action == 'skip' and processes.index() == 0:
      say(f'step {step}: {why}; batch {event["batch"]} is skipped')
    if action == 'roll_back':
      raise RollBack(f'step {step}: {why}; going back to step {event["to"]}')

  def _write(self) -> None:
    if self._events and processes.index() == 0:
      jsonio.write_text(self._file, ''.join(json.dumps(event) + '\n' for event in self._events))


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
  return jnp.isfinite(x).all()


def _some(names: list[str]) -> str:
  return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if names[3:] else '')
