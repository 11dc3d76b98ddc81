"""An ablation: arms that differ in what was named and in nothing else, run and compared by seeds.

Every arm is run with the same seeds.  A seed fixes the order of the text, the masks, and the first
value of each parameter that arms share, so that differences are taken seed by seed.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lmjax import config, jsonio
from lmjax import workdir as workdir_lib
from lmjax.ablate import arms as arms_lib
from lmjax.ablate import fixed, markdown, matching, page, report, runs, seed, slots
from lmjax.ablate.arms import Arm
from lmjax.ablate.fixed import Facts
from lmjax.ablate.runs import Job, Run
from lmjax.ablate.slots import Slot
from lmjax.config import did_you_mean
from lmjax.errors import UserError
from lmjax.sweep import Overrides

LOOKS = (
  'there were {count} looks ({looks}), with which a difference is called where there is none up to '
  '{count} times as often as alpha says: --alpha can be so much smaller'
)
PROBE = 12  # steps by which the time of one is measured


class Ablation:
  """Arms, proved to be comparable, and the runs of them in a directory."""

  def __init__(
    self,
    spec: str,
    workdir: str,
    vary: Sequence[str] = (),
    seeds: int = 3,
    match: str = '',
    may_move: Sequence[str] = (),
    vmap: str = '',
    parallel: int = 1,
    overrides: Overrides | None = None,
  ):
    """`spec` is FILE.py[:ARGUMENT]; `vary` holds 'KEY=V1,V2', or is empty for the file's sweep().

    `match` and `may_move` are by default what the file says of itself as MATCH and MAY_MOVE.
    With vmap='seeds' one compiled program trains all seeds of an arm, and with 'lr' those of all
    arms that differ in optimizer.lr alone.  So many processes share the machine as `parallel` says.
    All arms have the `overrides`.

    Raises:
      UserError: the arms do not load, or something moves that was not named; or the directory
        holds another ablation.
    """
    if seeds < 1:
      raise UserError(f'--seeds={seeds} must be at least 1')
    match = match or config.declared(spec, 'MATCH', 'steps')
    may_move = may_move or config.declared(spec, 'MAY_MOVE', ())
    if match not in matching.KINDS:
      raise UserError(f'--match={match} is nothing{did_you_mean(match, matching.KINDS)}')
    if vmap and match == 'time':
      raise UserError(f'--match=time is of runs that have a device alone: without --vmap_{vmap}')
    self.spec, self.match, self.vmap, self.parallel = spec, match, vmap, parallel
    self.directory = workdir_lib.on_disk(workdir)
    if (self.directory / 'config.json').exists():
      raise UserError(f'{self.directory} holds a run: choose another --workdir')
    asked = arms_lib.of(spec, vary, overrides)
    self.named = arms_lib.named(asked)
    configs = {arm.name: arm.config() for arm in asked}
    arms_lib.check_moved(arms_lib.moved(configs), asked, may_move)
    if vmap:
      for one in configs.values():
        seed.check(one)
    first = configs[asked[0].name]['seed']
    self.seeds = list(range(first, first + seeds))
    self._asked = asked

  @functools.cached_property
  def places(self) -> list[Slot]:
    """The shares of this machine; a UserError where it does not divide."""
    return slots.slots(self.parallel)

  def prove(self) -> list[str]:
    """Makes the data, solves for steps, and says what is the same in all arms.

    Raises:
      UserError: something moved that nobody has named.
    """
    facts = {arm.name: fixed.of(arm) for arm in self._asked}
    cost = {
      'steps': lambda arm: 1.0,
      'tokens': lambda arm: facts[arm.name].tokens,
      'flops': lambda arm: facts[arm.name].flops,
      'time': self._seconds_of_a_step,
    }[self.match]
    kept = self._kept()
    self.arms, remainders = matching.solve(self._asked, cost, self.match)
    self.remainders = {arm.name: x for arm, x in zip(self.arms, remainders, strict=True)}
    if kept and self.match == 'time':  # what was measured then holds
      known = lambda arm, key: kept['arms'].get(arm.name, {}).get(key)
      self.arms = [dataclasses.replace(a, solved=known(a, 'solved') or {}) for a in self._asked]
      self.remainders = {arm.name: known(arm, 'remainder') for arm in self.arms}
    self.facts: list[Facts] = [
      facts[arm.name]._replace(steps=arm.config()['steps']) for arm in self.arms
    ]
    solved = {key for arm in self.arms for key in arm.solved}
    fixed.check(self.facts, [*self.named, *solved])
    self.lines = fixed.lines(self.facts)
    self._said = self._told()
    self._take_up(kept)
    self.runs = runs.planned(self.arms, self.seeds, self.directory)
    return self.lines

  def check_metric(self, metric: str) -> None:
    """Raises a UserError where an arm does not report it, or it, or with '' nothing, compares."""
    for arm, facts in zip(self.arms, self.facts, strict=True):
      if metric and metric not in facts.metrics:
        raise UserError(f'{arm.name} does not report {metric}{did_you_mean(metric, facts.metrics)}')
    shared = set.intersection(*(set(facts.metrics) for facts in self.facts))
    report.chosen(metric, fixed.comparable(self.facts, self.named, shared), self.facts)

  def _kept(self) -> dict[str, Any] | None:
    path = self.directory / 'ablation.json'
    return jsonio.read(path) if path.exists() else None

  def _told(self) -> dict[str, Any]:
    """By what another ablation is known; the path of the file may be written otherwise."""
    now = {
      'match': self.match,
      'arms': {
        arm.name: {
          'solved': arm.solved,
          'remainder': self.remainders[arm.name],
          'config': {**arm.config(), 'check': None},
        }
        for arm in self.arms
      },
    }
    return json.loads(json.dumps(now))

  def _take_up(self, before: dict[str, Any] | None) -> None:
    """The same directory goes on with the same ablation; seeds may be added, and arms.

    None is taken away: the correction for many comparisons is of all that were made.
    """
    self._looks = [str(look) for look in before['looks']] if before else []
    if not before:
      return
    known, asked = before['arms'], self._said['arms']
    for arm in known.values():  # keys that have come since are as they are by default
      arm['config'] = {**config.resolve({**arm['config'], 'check': False}), 'check': None}
    gone = [name for name in known if name not in asked]
    changed = [name for name in known if name in asked and known[name] != asked[name]]
    added = [name for name in asked if name not in known]
    if gone:
      wrong = f'which has an arm {gone[0]} too: name it, or'
    elif changed or before['match'] != self.match:
      wrong = 'whose arms have other configs or are matched otherwise:'
    elif added and self.match == 'time':
      wrong = f'without {added[0]}, and how long a step takes was measured then:'
    else:
      return
    raise UserError(f'{self.directory} holds an ablation {wrong} choose another --workdir')

  @property
  def begun(self) -> bool:
    return self._kept() is not None

  def keep(self) -> None:
    """From here on the directory is this ablation's."""
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._write()
    except OSError as e:
      raise UserError(f'cannot write into {self.directory}: {e.strerror or e}') from e

  def _write(self) -> None:
    jsonio.write(epath.Path(self.directory / 'ablation.json'), {**self._said, 'looks': self._looks})

  def _look(self, metric: str, comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Remembers what was looked at: who adds to it or asks otherwise has another chance to err."""
    pairs = [len(one['seeds']) for one in comparisons if len(one['seeds']) > 1]
    if pairs:
      beside = f'{len(pairs)} beside {self.arms[0].name}'
      now = f'{metric} of {beside}, {sum(pairs)} pairs of runs'
      if now not in self._looks:
        self._looks.append(now)
        self._write()
    count = len(self._looks)
    return [LOOKS.format(looks='; '.join(self._looks), count=count)] if count > 1 else []

  def _seconds_of_a_step(self, arm: Arm) -> float:
    """Measured: a short run on what the runs will have."""
    if self._kept():
      return 1.0
    steps = {'steps': PROBE, 'optimizer.warmup_steps': 1, 'log.every': 1, 'evaluate.batches': 1}
    probe = dataclasses.replace(arm, solved=steps)
    where = self.directory / 'probes' / arm.name
    print(f'measuring a step of {arm.name}', flush=True)
    shutil.rmtree(where, ignore_errors=True)  # of an attempt that came no further
    run = Run(probe, self.seeds[0], where, first=False)
    for _ in runs.work([run], self.places[:1]):
      pass
    return runs.seconds_of_a_step(run)

  def work(self) -> Iterator[Run]:
    """Runs what is not finished; yields each run that comes to its end."""
    yield from runs.work(self.jobs(), self.places)

  def jobs(self) -> list[Job]:
    """What processes have to do until all runs have come to their end."""
    return runs.jobs(self.runs, self.vmap)

  def study(
    self,
    command: str,
    metric: str = '',
    margin: float | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
    price_per_hour: float | None = None,
  ) -> dict[str, Any]:
    """What is known by now, written as report.json, report.md and report.html."""
    configs = {arm.name: arm.config() for arm in self.arms}
    about = {
      'title': self.spec,
      'command': command,
      'match': self.match,
      'alpha': alpha,
      'power': power,
      'price_per_hour': price_per_hour,
      'parallel': self.parallel,
      'remainders': self.remainders,
      'fixed': {'named': self.named, 'moved': arms_lib.moved(configs), 'lines': self.lines},
    }
    study = report.collect(about, self.arms, self.facts, self.runs, metric, margin)
    study['caveats'] += self._look(study['metric'], study['comparisons'])
    for name, text in (
      ('report.json', json.dumps(study, indent=1) + '\n'),
      ('report.md', markdown.render(study)),
      ('report.html', page.render(study)),
    ):
      jsonio.write_text(epath.Path(self.directory / name), text)
    return study
