"""What an ablation has found: collected from the directories of its runs into one JSON object."""

import dataclasses
import math
import statistics as numbers
from collections.abc import Mapping, Sequence
from typing import Any

from lmjax import record, yardstick
from lmjax.ablate import caveats, fixed, statistics
from lmjax.ablate.arms import Arm
from lmjax.ablate.caveats import PLACES, SAME
from lmjax.ablate.fixed import Facts
from lmjax.ablate.runs import Run, results
from lmjax.errors import UserError

HIGHER = 'accuracy'  # what ends so is better the higher it is
UNITS = {
  'bits_per_byte': 'bits per byte',
  'pseudo_bits_per_byte': 'bits per byte',
  'perplexity': '',
}


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
  lower = not kind.endswith(HIGHER)
  unit, alpha, power = UNITS.get(kind, 'nats') if lower else '', about['alpha'], about['power']
  about = {**about, 'metric': metric, 'unit': unit, 'margin': margin, 'lower_is_better': lower}
  found = statistics.compare(values, metric, unit, lower, margin, alpha, power)
  seen = caveats.seen(arms, facts, told)
  return {
    **about,
    'arms': [
      _arm(arm, one, [x for r, x in told.items() if r.arm == arm], about)
      for arm, one in zip(arms, facts, strict=True)
    ],
    'comparable': {**shared, 'train/loss': fixed.training(facts, named)},
    'comparisons': [_said(dataclasses.asdict(comparison), told) for comparison in found],
    'fixed': {**about['fixed'], 'lines': about['fixed']['lines'] + seen.lines},
    'noise': statistics.noise(values, alpha, power),
    'caveats': [*caveats.of(told, about, arms), *seen.caveats],
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
  made |= {'paid': None, 'tokens_per_second': None, 'record': {}, 'restarts': []}
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
    made['paid'] = sum(x for kind, x in result['goodput'].items() if kind not in ('wall', 'down'))
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
  paid, price = mean('paid'), about['price_per_hour']
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
    'seconds': mean('seconds'),
    'price': None if None in (price, paid) else price / about['parallel'] * paid / 3600,
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
