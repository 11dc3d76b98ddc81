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
  """What has to be read before a verdict is believed."""
  said = []
  written = [one['record'] for one in told.values() if one['record']]
  for key in SAME:
    found = {json.dumps(one[key], sort_keys=True): None for one in written}
    if len(found) > 1:
      said.append(f'not all runs had the same {key}: {"; ".join(found)}')
  stopped = [f'{r.arm.name} seed {r.seed}' for r, x in told.items() if x['status'] == 'diverged']
  if stopped:
    said.append(f'stopped by their numbers, and in no mean: {", ".join(stopped)}')
  left_out = {r: _left_out(r) for r in told}
  alone = [
    f'{r.arm.name} seed {r.seed}'
    for r, steps in left_out.items()
    if steps and any(steps != x for other, x in left_out.items() if other.seed == r.seed)
  ]
  if alone:
    said.append(f'the guard has left batches out that others have seen: {", ".join(alone)}')
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
  """Runs of one arm, which do the same work on one machine, tell what else that did."""
  rates: dict[tuple[str, str], list[float]] = {}
  for r, one in told.items():
    if one['tokens_per_second']:
      where = json.dumps(one['record'].get('machine'), sort_keys=True)
      rates.setdefault((r.arm.name, where), []).append(one['tokens_per_second'])
  spread = [(max(of) / min(of), name, min(of), max(of)) for (name, _), of in rates.items()]
  ratio, name, slow, fast = max(spread, default=(0.0, '', 0.0, 0.0))
  if ratio < STEADY:
    return []
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


def seen(
  arms: Sequence[Arm], facts: Sequence[Facts], told: Mapping[Run, Mapping[str, Any]]
) -> Seen:
  """How alike the runs began, and whether they saw the same batches."""
  begun = {(r.arm.name, r.seed): r for r in told if (r.workdir / 'record.json').exists()}
  pairs = [
    (begun[arms[0].name, seed], run)
    for (name, seed), run in begun.items()
    if name != arms[0].name and (arms[0].name, seed) in begun
  ]
  of = {arm.name: one for arm, one in zip(arms, facts, strict=True)}
  lines, caveats, wrong = [], [], 0
  alike = {pair: same for pair in pairs if (same := _saw_the_same(*pair)) is not None}
  if alike:
    count = f'{sum(alike.values())} of {len(alike)} pairs of runs'
    lines.append(f'batches seen: the same, bit for bit, in {count}')
    wrong = sum(not same and not _may_differ(pair, of) for pair, same in alike.items())
  if wrong:
    caveats.append(
      f'in {wrong} of {len(alike)} pairs runs have seen other batches, which nothing that was '
      'named explains'
    )
  together = [r for r in begun.values() if told[r]['record']['machine'].get('runs', 1) > 1]
  if together:
    lines.append(
      f'{len(together)} of {len(told)} runs were trained in one program with others, and the '
      'command of each is that of it alone: its numbers are these up to rounding, which training '
      'makes grow'
    )
  for arm in arms[1:]:
    initial = [
      [record.read(r.workdir, 'record.json').get('initial', {}) for r in pair]
      for pair in pairs
      if pair[1].arm.name == arm.name
    ]
    same = [sum(a.get(name) == x for name, x in b.items()) for a, b in initial]
    if initial:
      count = f'{min(same)} of {len(initial[0][1])} arrays'
      lines.append(f'initial values of {arm.name}: those of the reference in {count}, in each seed')
  return Seen(lines, caveats)


def _may_differ(pair: tuple[Run, Run], of: Mapping[str, Facts]) -> bool:
  """Whether what was named, or what the guard decided, may move batches."""
  a, b = (run.arm for run in pair)
  named = [
    key for key in {**a.overrides, **b.overrides} if a.overrides.get(key) != b.overrides.get(key)
  ]
  first, second = of[a.name], of[b.name]
  moved = (first.rows, first.batch) != (second.rows, second.batch)
  return fixed.other_objective(named) or moved or any(map(_left_out, pair))


def _saw_the_same(first: Run, second: Run) -> bool | None:
  """As far as both have come; None where one has not begun."""
  ledgers = [record.lines(r.workdir, 'ledger.jsonl') for r in (first, second)]
  n = min(map(len, ledgers))
  return ledgers[0][:n] == ledgers[1][:n] if n else None


def _left_out(run: Run) -> list[tuple[Any, ...]]:
  """What the guard has decided."""
  events = record.lines(run.workdir, 'events.jsonl')
  return [(event['event'], event['step'], event['batch']) for event in events]
