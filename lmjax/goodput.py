"""Where the time of a run goes, from its first start to its end, kills and pauses included."""

import collections
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from lmjax import jsonio, processes
from lmjax.errors import UserError

KINDS = (
  'productive',  # steps whose results the run still has
  'lost',  # steps that were made again, since the run had not saved them or went back over them
  'input_wait',
  'evaluate',
  'save_blocked',  # what a save kept the steps waiting
  'restore',
  'compile',
  'down',  # between a sign of life and the next start
  'other',  # to prepare, and to finish
)


class Clock(contextlib.AbstractContextManager):
  """At every moment the time goes to one kind; goodput.json has the seconds of each so far."""

  def __init__(self, path: epath.Path, among: int = 1):
    """`path`: the directory of the run; what its former starts took is added.

    A run that shares its machine with others, `among` so many, counts its share of the time.
    """
    self._file = path / 'goodput.json'
    before = _checked(jsonio.read(self._file), self._file) if self._file.exists() else {}
    now = time.time()
    self._began, self._among = before.get('began', now), among
    self._seconds = collections.Counter(dict.fromkeys(KINDS, 0.0) | before.get('seconds', {}))
    self._seconds['down'] += max(0.0, now - before.get('until', now)) / among
    self._kind, self._since = 'other', time.monotonic()

  def __exit__(self, *_: object) -> None:
    self.write()

  @contextlib.contextmanager
  def of(self, kind: str) -> Iterator[None]:
    """The time inside goes to `kind`."""
    former = self._switch(kind)
    try:
      yield
    finally:
      self._switch(former)

  def timed(self, kind: str, function: Callable) -> Callable:
    """The function, whose time goes to `kind`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
      with self.of(kind):
        return function(*args, **kwargs)

    return call

  def mark(self) -> float:
    """The seconds of the steps so far, which a checkpoint remembers."""
    self.write()
    return self._seconds['productive']

  def take_up(self, productive: float) -> None:
    """The run goes on from where it had so many productive seconds; those after it are lost."""
    self._switch(self._kind)
    self._seconds['lost'] += self._seconds['productive'] - productive
    self._seconds['productive'] = productive

  def summary(self) -> dict[str, float]:
    """Kind -> seconds, and 'wall', the time by the clock on the wall.

    That is their sum, unless the run has shared its machine.
    """
    self._switch(self._kind)
    return {**self._seconds, 'wall': time.time() - self._began}

  def write(self) -> None:
    """So that what a run that is killed has taken until now is known."""
    self._switch(self._kind)
    seconds = dict(self._seconds)
    content = {'began': self._began, 'until': time.time(), 'seconds': seconds}
    if processes.index() == 0 and (self._file.parent / 'config.json').exists():
      with contextlib.suppress(OSError):  # no reason to end a run
        jsonio.write_text(self._file, json.dumps(content) + '\n')

  def _switch(self, kind: str) -> str:
    former, now = self._kind, time.monotonic()
    self._seconds[former] += (now - self._since) / self._among
    self._kind, self._since = kind, now
    return former


def _checked(before: dict[str, Any], file: epath.Path) -> dict[str, Any]:
  seconds = before.get('seconds')
  numbers = [before.get('began'), before.get('until')]
  numbers += seconds.values() if isinstance(seconds, dict) else [None]
  if not all(isinstance(x, int | float) for x in numbers) or not seconds.keys() <= set(KINDS):
    raise UserError(f'{file} is damaged: remove it, and the time until now is not known')
  return before
