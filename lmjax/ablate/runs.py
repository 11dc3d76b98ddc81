"""The runs of an ablation: each in a process and a directory of its own, taken up until it ends."""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from lmjax import command, errors, guard, jsonio, record
from lmjax import workdir as workdir_lib
from lmjax.ablate.arms import Arm
from lmjax.ablate.slots import CONFINES, Slot
from lmjax.errors import NonFinite, Restart, UserError
from lmjax.terminal import say

TRIES = 5  # starts without a new checkpoint, before a run is given up
POLL = 0.2  # seconds
SEEDS = 'seeds.log'  # beside the seeds that are trained together
LEAVES = 60  # seconds that a run may take to save when its ablation is gone


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """An arm with a seed."""

  arm: Arm
  seed: int
  workdir: pathlib.Path
  first: bool  # of its arm: the oracles are tried in it alone

  @property
  def runs(self) -> 'list[Run]':
    return [self]

  @property
  def argv(self) -> list[str]:
    """Of Python, behind -m."""
    check = [] if self.first else ['--config.check=False']
    return ['lmjax.main', *self.arm.flags(self.seed), f'--workdir={self.workdir}', *check]

  @property
  def command(self) -> str:
    return shlex.join(['python', '-m', *self.argv])

  @property
  def log(self) -> pathlib.Path:
    return self.workdir.with_name(f'{self.workdir.name}.log')

  def outcome(self) -> tuple[str, str]:
    """('finished' | 'diverged' | 'unfinished', why)."""
    if (self.workdir / 'result.json').exists():
      return 'finished', ''
    if why := guard.stopped(epath.Path(self.workdir)):
      return 'diverged', why
    said = _said(self.log) or _said(self.workdir.with_name(SEEDS))
    return 'unfinished', said[0] if said else 'it has not come to its end yet'


@dataclasses.dataclass(frozen=True, eq=False)
class Together:
  """Seeds of an arm that one program trains, or of arms that have a learning rate each."""

  runs: Sequence[Run]

  @property
  def argv(self) -> list[str]:
    """Of Python, behind -m."""
    where = {run.arm: run.workdir.parent for run in self.runs}
    seeds = ','.join(map(str, sorted({run.seed for run in self.runs})))
    check = [] if any(run.first for run in self.runs) else ['--config.check=False']
    own = []
    for arm in where:
      own += [f'--lr={arm.config()["optimizer"]["lr"]}'] if len(where) > 1 else []
      own.append(f'--workdir={where[arm]}')
    arm = self.runs[0].arm
    if len(where) > 1:
      arm = dataclasses.replace(arm, overrides=_but_lr(arm))
    return ['lmjax.ablate.vmapped', *arm.flags(), f'--seeds={seeds}', *own, *check]

  @property
  def command(self) -> str:
    return shlex.join(['python', '-m', *self.argv])

  @property
  def log(self) -> pathlib.Path:
    return self.runs[0].workdir.with_name(SEEDS)


Job = Run | Together  # what a process does


def jobs(runs: Sequence[Run], vmap: str = '') -> list[Job]:
  """What is left to do: run by run, or together the 'seeds' of an arm, or all of its 'lr' too."""
  left = [run for run in runs if run.outcome()[0] == 'unfinished']
  if not vmap:
    return left
  of: dict[str, list[Run]] = {}
  for run in runs:
    what = (_but_lr(run.arm), run.arm.solved) if vmap == 'lr' else run.arm.name
    of.setdefault(str(what), []).extend([run] if run in left else [])
  return [Together(found) for found in of.values() if found]


def _but_lr(arm: Arm) -> dict[str, Any]:
  return {key: x for key, x in arm.overrides.items() if key != 'optimizer.lr'}


def planned(arms: Sequence[Arm], seeds: Sequence[int], directory: pathlib.Path) -> list[Run]:
  """Seed by seed, so that what is there when it is stopped can be compared."""
  where = directory / 'runs'
  return [
    Run(arm, seed, where / arm.name / str(seed), seed == seeds[0]) for seed in seeds for arm in arms
  ]


def work(todo: Sequence[Job], places: Sequence[Slot]) -> Iterator[Run]:
  """Does the jobs side by side in `places`; yields each run that has come to its end.

  Where one ends with a mistake, nothing more is begun of its arm, and the others go on.

  Raises:
    UserError: at the end, where a job has ended again and again without any progress, or with a
      mistake of the user's.
    StorageError, RuntimeError: or with such a one.
  """
  for run in (run for job in todo for run in job.runs):
    _await(run.workdir)
  todo, free, going = deque(todo), deque(places), {}
  wrong: dict[Arm, Exception] = {}
  try:
    while todo or going:
      while todo and free:
        job = todo.popleft()
        if not any(run.arm in wrong for run in job.runs):
          going[job] = _Try(job, free.popleft())
      time.sleep(POLL)
      for job, attempt in list(going.items()):
        if not attempt.ended():
          continue
        del going[job]
        free.append(attempt.place)
        if attempt.error is None:
          yield from job.runs
        else:
          say(str(attempt.error))
          wrong |= {run.arm: attempt.error for run in job.runs}
  finally:
    for attempt in going.values():
      attempt.stop()
  if wrong:
    first = next(iter(wrong.values()))
    raise type(first)(f'not run to the end: {", ".join(arm.name for arm in wrong)}')


def _await(workdir: pathlib.Path) -> None:
  """One whose ablation was killed saves and leaves; before that, nobody takes it up."""
  until = time.monotonic() + LEAVES
  while who := workdir_lib.owner(epath.Path(workdir)):
    if time.monotonic() > until:
      raise UserError(who)
    time.sleep(POLL)


class _Try:
  """The starts of a job, one after the other."""

  def __init__(self, job: Job, place: Slot):
    self.job, self.place = job, place
    self._tries, self._came = 0, -1
    self.error: Exception | None = None  # by which it has ended
    self._start()

  def _start(self) -> None:
    self.job.log.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, '-m', *self.job.argv, f'--parent={os.getpid()}']
    streams = dict(stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    environment = os.environ | dict(self.place.environment)
    self._held = contextlib.ExitStack()
    with self.job.log.open('ab') as log:
      began = command.child(argv, saves=True, stdout=log, env=environment, **streams)
      self._process = self._held.enter_context(began)
    if CONFINES:
      os.sched_setaffinity(self._process.pid, self.place.cores)

  def ended(self) -> bool:
    """Whether it has come to its end; where it was killed or wants it, it is started again."""
    code = self._process.poll()
    if code is None:
      return False
    self._held.close()
    if code in (0, NonFinite.exit_code):
      if any(run.outcome()[0] == 'unfinished' for run in self.job.runs):
        self.error = RuntimeError(f'{self.job.command} has left some of its runs unfinished')
      return True
    if code > 0 and code != Restart.exit_code:
      said = f'{self.job.command} ended with {code}: {_last(self.job.log)}'
      self.error = errors.of_code(code)(said)
      return True
    self._tries += 1
    came = max((x for run in self.job.runs for x in _steps(run.workdir)), default=-1)
    if came > self._came:
      self._tries, self._came = 0, came
    if self._tries >= TRIES:
      self.error = UserError(
        f'{self.job.command} ended with {code}, {TRIES} times without a new checkpoint: '
        f'{_last(self.job.log)}'
      )
      return True
    self._start()
    return False

  def stop(self) -> None:
    """As from a signal: it saves, and leaves."""
    self._held.close()


def _steps(workdir: pathlib.Path) -> list[int]:
  there = workdir / 'checkpoints'
  names = [path.name for path in there.iterdir()] if there.exists() else []
  return [int(name) for name in names if name.isdecimal()]


def _last(log: pathlib.Path) -> str:
  """What it said at its end: the sentence of a mistake, or the last lines."""
  return '\n'.join(_said(log) or _lines(log))


def _said(log: pathlib.Path) -> list[str]:
  """The last sentence for the user, and what follows it; nothing where there is none."""
  lines = _lines(log)
  at = [i for i, line in enumerate(lines) if line.startswith('lmjax: ')]
  return [lines[at[-1]].removeprefix('lmjax: '), *lines[at[-1] + 1 :]] if at else []


def _lines(log: pathlib.Path) -> list[str]:
  """The last of what it printed."""
  text = log.read_text(errors='replace') if log.exists() else ''
  return [line for line in text.splitlines() if line.strip()][-12:]


def results(run: Run) -> dict[str, Any]:
  """What a finished run has to say: its result.json."""
  return jsonio.read(run.workdir / 'result.json')


def seconds_of_a_step(run: Run) -> float:
  """Of a finished run: the median of those after the first few."""
  config = record.read(run.workdir, 'config.json')
  lines = record.lines(run.workdir, 'metrics.jsonl')
  rates = [x['perf/tokens_per_second'] for x in lines if 'perf/tokens_per_second' in x]
  return config['batch'] * config['length'] / statistics.median(rates[len(rates) // 3 :])
