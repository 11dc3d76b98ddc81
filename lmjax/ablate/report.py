"""What an ablation has found: collected from the directories of its runs into one JSON object."""

import dataclasses
import json
import math
import statistics as numbers
from collections.abc import Mapping, Sequence
from typing import Any

from lmjax import record, yardstick
from lmjax.ablate import fixed, statistics
from lmjax.ablate.arms import Arm
from lmjax.ablate.fixed import Facts
from lmjax.ablate.runs import Run, results
from lmjax.errors import UserError

HIGHER = (
  'accuracy',
  'mlm_accuracy',
  'nsp_accuracy',
  'masked_accuracy',
)  # are better the higher they are
UNITS = {
  'bits_per_byte': 'bits per byte',
  'pseudo_bits_per_byte': 'bits per byte',
  'perplexity': '',
  **dict.fromkeys(HIGHER, ''),
}
PLACES = ('CUDA_VISIBLE_DEVICES', 'TPU_VISIBLE_CHIPS')  # which share of the machine a run had
STEADY = 1.25  # seeds of an arm differ less in their speed where nothing else runs
SAME = ('code', 'versions', 'machine', 'environment')  # of the records of all runs


def collect(
  about: Mapping[str, Any],
  arms: Sequence[Arm],
  facts: Sequence[Facts],
  runs: Sequence[Run],
  metric: str = '',
  margin: float | None = None,
) -> dict[str, Any]:
  """The study, of as many runs as are finished.  `about`: its title, command, match and so on;
  the price is that of a machine which `parallel` runs share.

  `metric` is by default the first that all arms share; `margin`, by default half a percent of the
  reference's mean, is the size below which no difference matters.

  Raises:
    UserError: nothing that was reported compares between the arms, or not that metric.
  """
  named = sorted({key for arm in arms for key in arm.overrides})
  told = {run: _run(run) for run in runs}
  reported = [set(one['metrics']) for one in told.values() if one['status'] == 'finished']
  shared = fixed.comparable(facts, named, set().union(*reported))
  for name in shared:
    if not all(name in one for one in reported):
      shared[name] = shared[name] or 'not every run has it'
  metric = chosen(metric, shared, facts)
  for one in told.values():
    _judge(one, metric)
  kind = metric.rpartition('/')[2]
  values = {
    arm.name: {r.seed: x['value'] for r, x in told.items() if r.arm == arm and _has(x)}
    for arm in arms
  }
  reference = [*values[arms[0].name].values()]
  if margin is None:
    margin = float(f'{0.005 * abs(numbers.fmean(reference)):.2g}') if reference else 0.0
  unit = UNITS.get(kind, 'nats')
  about = {**about, 'metric': metric, 'unit': unit, 'margin': margin}
  about['lower_is_better'] = kind not in HIGHER
  alpha, power = about['alpha'], about['power']
  found = statistics.compare(
    values, metric, unit, about['lower_is_better'], margin, alpha=alpha, power=power
  )
  return {
    **about,
    'arms': [
      _arm(arm, one, [x for r, x in told.items() if r.arm == arm], about)
      for arm, one in zip(arms, facts, strict=True)
    ],
    'comparable': {**shared, 'train/loss': fixed.training(facts, named)},
    'comparisons': [_said(dataclasses.asdict(comparison), told) for comparison in found],
    'fixed': {**about['fixed'], 'lines': about['fixed']['lines'] + _seen(arms, runs)},
    'noise': statistics.noise(values, alpha, power),
    'caveats': _caveats(told),
    'curves': {
      arm.name: {
        str(r.seed): _curve(r, one.flops / one.tokens, one.tokens) for r in runs if r.arm == arm
      }
      for arm, one in zip(arms, facts, strict=True)
    },
  }


def _said(comparison: dict[str, Any], told: Mapping[Run, Mapping[str, Any]]) -> dict[str, Any]:
  """An arm that does not survive is not judged by the seeds that did."""
  names = comparison['arms']
  stopped = [r for r, x in told.items() if r.arm.name in names and x['status'] == 'diverged']
  if not stopped:
    return comparison
  counts = {name: sum(r.arm.name == name for r in stopped) for name in names}
  count = len({r.seed for r in told})
  said = ' and '.join(f'{name} in {n} of {count} seeds' for name, n in counts.items() if n)
  unknown = dict.fromkeys(('difference', 'interval', 'p_value', 'p_holm', 'seeds_needed'))
  unknown['pairing_gain'] = None
  made = {'outcome': 'diverged', 'verdict': f'stopped by its numbers: {said}'}
  return comparison | unknown | made


def _judge(run: dict[str, Any], metric: str) -> None:
  """Its value; an update may have overflown in the last step, which only an evaluation tells."""
  value = run['metrics'].get(metric)
  if value is not None and not math.isfinite(value):
    run |= {'status': 'diverged', 'why': f'{metric} is {value} at its end'}
  run['metrics'] = {key: x if math.isfinite(x) else None for key, x in run['metrics'].items()}
  run['value'] = run['metrics'].get(metric)


def _has(run: Mapping[str, Any]) -> bool:
  return run['status'] == 'finished' and run['value'] is not None


def chosen(asked: str, shared: Mapping[str, str], facts: Sequence[Facts]) -> str:
  """The metric that was asked for, or the first that compares of those that are `shared`.

  Raises:
    UserError: it does not compare, or none does.
  """
  if asked and not shared:  # nothing is finished
    return asked
  if asked:
    if asked not in shared:
      raise UserError(f'no run reports "{asked}" (there are {", ".join(shared)})')
    if shared[asked]:
      raise UserError(f'"{asked}" does not compare: {shared[asked]}')
    return asked
  sets = [*facts[0].sets, yardstick.NAME]
  kinds = ('xent', 'bits_per_byte', 'loss', 'masked_xent')
  wanted = [f'eval/{name}/{kind}' for name in sets for kind in kinds]
  if not shared:  # nothing is finished
    return wanted[0]
  found = next((name for name in wanted if shared.get(name) == ''), '')
  if not found:
    why = '; '.join(f'{name}: {why}' for name, why in shared.items())
    raise UserError(
      f'the arms share no number by which they could be compared ({why}); with the same tokenizer '
      '--config.evaluate.yardstick=64 gives them one'
    )
  return found


def _run(run: Run) -> dict[str, Any]:
  status, why = run.outcome()
  made = {'seed': run.seed, 'workdir': str(run.workdir), 'status': status, 'why': why}
  made |= {'command': run.command, 'metrics': {}, 'value': None, 'seconds': None}
  made |= {'tokens_per_second': None, 'record': {}, 'restarts': []}
  if (run.workdir / 'record.json').exists():
    written = record.read(run.workdir, 'record.json')
    made['record'] = {key: written.get(key) for key in SAME}
    variables = (written.get('environment') or {}).items()
    made['record']['environment'] = {key: x for key, x in variables if key not in PLACES}
    made['restarts'] = [one['changed'] for one in written.get('restarts', [])]
  if status == 'finished':
    result = results(run)
    made['metrics'] = {key: x for key, x in result['metrics'].items() if key.startswith('eval/')}
    made['seconds'] = result['goodput']['productive'] + result['goodput']['input_wait']
    rates = [x['perf/tokens_per_second'] for x in _lines(run) if 'perf/tokens_per_second' in x]
    made['tokens_per_second'] = numbers.median(rates) if rates else None
  return made


def _lines(run: Run) -> list[dict[str, Any]]:
  return record.lines(run.workdir, 'metrics.jsonl')


def _arm(
  arm: Arm, facts: Facts, runs: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> dict[str, Any]:
  values = [run['value'] for run in runs if _has(run)]
  mean = lambda key: _mean([run[key] for run in runs if run[key] is not None])
  seconds, price = mean('seconds'), about['price_per_hour']
  return {
    'name': arm.name,
    'overrides': arm.overrides,
    'solved': arm.solved,
    'command': arm.command(),
    'parameters': facts.parameters,
    'flops_per_token': facts.flops / facts.tokens,
    'steps': facts.steps,
    'tokens': facts.steps * facts.tokens,
    'flops': facts.steps * facts.flops,
    'remainder': about['remainders'][arm.name],
    'mean': _mean(values),
    'deviation': numbers.stdev(values) if len(values) > 1 else None,
    'tokens_per_second': mean('tokens_per_second'),
    'seconds': seconds,
    'price': None if None in (price, seconds) else price / about['parallel'] * seconds / 3600,
    'runs': list(runs),
  }


def _mean(values: Sequence[float]) -> float | None:
  return numbers.fmean(values) if values else None


def _curve(run: Run, flops_per_token: float, tokens: int) -> dict[str, list[float]]:
  """The training loss against what it cost."""
  lines = [x for x in _lines(run) if 'train/loss' in x]
  steps, seconds, before = [x['step'] for x in lines], [], 0
  for x in lines:
    took = (x['step'] - before) * tokens / x['perf/tokens_per_second']
    seconds.append((seconds[-1] if seconds else 0.0) + took)
    before = x['step']
  return {
    'steps': steps,
    'tokens': [step * tokens for step in steps],
    'flops': [step * tokens * flops_per_token for step in steps],
    'seconds': seconds,
    'loss': [x['train/loss'] for x in lines],
  }


def _caveats(told: Mapping[Run, Mapping[str, Any]]) -> list[str]:
  said = []
  written = [one['record'] for one in told.values() if one['record']]
  for key in SAME:
    found = {json.dumps(one[key], sort_keys=True): None for one in written}
    if len(found) > 1:
      said.append(f'not all runs had the same {key}: {"; ".join(found)}')
  stopped = [f'{r.arm.name} seed {r.seed}' for r, x in told.items() if x['status'] == 'diverged']
  if stopped:
    said.append(f'stopped by their numbers, and in no mean: {", ".join(stopped)}')
  said += _restarts(told)
  said += _unsteady(told)
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


def _seen(arms: Sequence[Arm], runs: Sequence[Run]) -> list[str]:
  """What the runs' own records say of how alike they began, and of the batches that they saw."""
  pairs = [
    (next(r for r in runs if r.arm == arms[0] and r.seed == run.seed), run)
    for run in runs
    if run.arm != arms[0]
  ]
  pairs = [pair for pair in pairs if all((r.workdir / 'record.json').exists() for r in pair)]
  if not pairs:
    return []
  alike = 0
  for pair in pairs:
    ledgers = [record.lines(r.workdir, 'ledger.jsonl') for r in pair]
    n = min(map(len, ledgers))
    alike += n > 0 and ledgers[0][:n] == ledgers[1][:n]
  said = [f'batches seen: the same, bit for bit, in {alike} of {len(pairs)} pairs of runs']
  for arm in arms[1:]:
    begun = [
      [record.read(r.workdir, 'record.json').get('initial', {}) for r in pair]
      for pair in pairs
      if pair[1].arm == arm
    ]
    same = [sum(a.get(name) == x for name, x in b.items()) for a, b in begun]
    if begun:
      count = f'{min(same)} of {len(begun[0][1])} arrays'
      said.append(f'initial values of {arm.name}: those of the reference in {count}, in each seed')
  return said
