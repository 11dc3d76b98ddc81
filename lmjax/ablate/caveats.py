"""What the runs' own records say for what is concluded from them, and against it."""

import json
import statistics as numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmjax import record, yardstick
from lmjax.ablate import fixed
from lmjax.ablate.arms import Arm
from lmjax.ablate.fixed import Facts
from lmjax.ablate.runs import Run

PLACES = ('CUDA_VISIBLE_DEVICES', 'TPU_VISIBLE_CHIPS')  # which share of the machine a run had
SAME = ('code', 'versions', 'machine', 'environment')  # of the records of all runs
STEADY = 1.25  # seeds of an arm differ less in their speed where nothing else runs
TIMED = 0.05  # of the time that arms were to have alike


class Seen(NamedTuple):
  lines: list[str]
  caveats: list[str]


def of(
  told: Mapping[Run, Mapping[str, Any]],
  about: Mapping[str, Any],
  arms: Sequence[Arm],
) -> list[str]:
  """What has to be read before a verdict is believed: of runs, what each has told."""
  said = []
  written = [one['record'] for one in told.values() if one['record']]
  for key in SAME:
    found = {json.dumps(one[key], sort_keys=True): None for one in written}
    if len(found) > 1:
      said.append(f'not all runs had the same {key}: {"; ".join(found)}')
  stopped = [f'{r.arm.name} seed {r.seed}' for r, x in told.items() if x['status'] == 'diverged']
  if stopped:
    said.append(f'stopped by their numbers, and in no mean: {", ".join(stopped)}')
  decided = [f'{r.arm.name} seed {r.seed}' for r, x in told.items() if any(x['decisions'].values())]
  if decided:
    said.append(f'the guard has left batches out that others have seen: {", ".join(decided)}')
  said += _restarts(told)
  said += _unsteady(told)
  if about['match'] == 'time':
    said += _mistimed(told)
  if about['metric'].startswith(f'eval/{yardstick.NAME}/'):
    windows = arms[0].config()['evaluate'][yardstick.NAME]
    said.append(
      f'{about["metric"]} is of {windows} windows of {yardstick.WIDTH} tokens: what another text '
      'would say is in no interval, and no seed tells it; evaluate.yardstick may be larger'
    )
  unfinished = sum(one['status'] == 'unfinished' for one in told.values())
  if unfinished:
    said.append(f'{unfinished} of {len(told)} runs are not finished')
  return said


def _restarts(told: Mapping[Run, Mapping[str, Any]]) -> list[str]:
  """What had changed where runs were taken up again."""
  found: dict[str, list[str]] = {}
  for r, one in told.items():
    for changed in one['restarts']:
      for key, (before, now) in changed.items():
        if key.split('.')[0] in SAME and key.split('.')[-1] not in PLACES:
          found.setdefault(f'{key} was {before}, then {now}', []).append(
            f'{r.arm.name} seed {r.seed}'
          )
  return [f'{what} where these went on: {", ".join(where)}' for what, where in found.items()]


def _unsteady(told: Mapping[Run, Mapping[str, Any]]) -> list[str]:
  """Runs of one arm, which do the same work, tell what else the machine did."""
  rates: dict[str, list[float]] = {}
  for r, one in told.items():
    if one['tokens_per_second']:
      rates.setdefault(r.arm.name, []).append(one['tokens_per_second'])
  spread = {name: (min(of), max(of)) for name, of in rates.items()}
  name = max(spread, key=lambda name: spread[name][1] / spread[name][0], default='')
  if not name or spread[name][1] < STEADY * spread[name][0]:
    return []
  slow, fast = spread[name]
  return [
    f'times and prices are of a machine that did other work too: {name} trained on {slow:,.0f} to '
    f'{fast:,.0f} tokens a second'
  ]


def _mistimed(told: Mapping[Run, Mapping[str, Any]]) -> list[str]:
  """Steps were solved for by what a step took before; what they took in the end may differ."""
  times: dict[str, list[float]] = {}
  for r, one in told.items():
    if one['seconds']:
      times.setdefault(r.arm.name, []).append(one['seconds'])
  means = {name: numbers.fmean(of) for name, of in times.items()}
  first = next(iter(told)).arm.name
  if first not in means:
    return []
  beside = {name: mean / means[first] - 1 for name, mean in means.items()}
  return [
    f'arms are matched by time, and {name} has trained {abs(x):.0%} {"longer" if x > 0 else "less"}'
    for name, x in beside.items()
    if abs(x) > TIMED
  ]


def seen(arms: Sequence[Arm], facts: Sequence[Facts], runs: Sequence[Run]) -> Seen:
  """How alike the runs began, and whether they saw the same batches."""
  pairs = [
    (next(r for r in runs if r.arm == arms[0] and r.seed == run.seed), run)
    for run in runs
    if run.arm != arms[0]
  ]
  pairs = [pair for pair in pairs if all((r.workdir / 'record.json').exists() for r in pair)]
  if not pairs:
    return Seen([], [])
  alike = [same for pair in pairs if (same := _saw_the_same(*pair)) is not None]
  said = f'batches seen: the same, bit for bit, in {sum(alike)} of {len(alike)} pairs of runs'
  other = fixed.other_objective([key for arm in arms for key in arm.overrides])
  if other and not all(alike):
    said += ' (masks and labels are of them, and the objective is another)'
  lines, caveats = [said], []
  if not other and not all(alike) and len({(one.rows, one.batch) for one in facts}) == 1:
    caveats.append(
      f'in {alike.count(False)} of {len(alike)} pairs runs have seen other batches, which nothing '
      'that was named explains'
    )
  for arm in arms[1:]:
    begun = [
      [record.read(r.workdir, 'record.json').get('initial', {}) for r in pair]
      for pair in pairs
      if pair[1].arm == arm
    ]
    same = [sum(a.get(name) == x for name, x in b.items()) for a, b in begun]
    if begun:
      count = f'{min(same)} of {len(begun[0][1])} arrays'
      lines.append(f'initial values of {arm.name}: those of the reference in {count}, in each seed')
  return Seen(lines, caveats)


def _saw_the_same(first: Run, second: Run) -> bool | None:
  """As far as both have come; None where one has not begun."""
  ledgers = [record.lines(r.workdir, 'ledger.jsonl') for r in (first, second)]
  n = min(map(len, ledgers))
  return ledgers[0][:n] == ledgers[1][:n] if n else None
