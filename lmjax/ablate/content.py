"""What a report of an ablation says, as sentences and cells, before it is HTML or Markdown.

Nothing is escaped here: names are as they are in the study.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from lmjax.ablate import numbers
from lmjax.ablate.numbers import NOTHING
from lmjax.record import flatten

Study = dict[str, Any]  # report.json
WORDS = {  # for the outcomes of a comparison
  'better': 'better',
  'worse': 'worse',
  'equivalent': 'no difference of interest',
  'same': 'the same',
  'inconclusive': 'inconclusive',
  'unknown': 'unknown',
  'diverged': 'stopped by its numbers',
}


@dataclasses.dataclass(frozen=True)
class Text:
  words: str


@dataclasses.dataclass(frozen=True)
class Bullets:
  items: list[str]


@dataclasses.dataclass(frozen=True)
class Table:
  """The first cell of a row names it; the others are `numeric`, or words."""

  title: str
  head: list[str]
  rows: list[list[str]]
  numeric: bool = False


@dataclasses.dataclass(frozen=True)
class Commands:
  """To be copied, one by one."""

  title: str
  lines: list[str]


Block = Text | Bullets | Table | Commands


@dataclasses.dataclass(frozen=True)
class Section:
  title: str
  blocks: list[Block]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Of `arm` against `reference`; `facts` are pairs of what and how much."""

  arm: str
  reference: str
  outcome: str
  sentence: str
  facts: list[tuple[str, str]]


def headline(study: Study) -> str:
  """What was compared, in a line."""
  arms, seeds = numbers.many(len(study['arms']), 'arm'), numbers.many(len(_seeds(study)), 'seed')
  better = 'lower' if study['lower_is_better'] else 'higher'
  least = f'; less than {study["margin"]:g}{numbers.unit(study)} is of no interest'
  return (
    f'{arms} × {seeds} at the same {_matched(study)}, by {study["metric"]}: {better} is better'
    f'{least if study["margin"] else ""}.'
  )


def verdicts(study: Study) -> list[Verdict]:
  return [_verdict(study, comparison) for comparison in study['comparisons']]


def summary(study: Study) -> str:
  """How many comparisons came out how; what else has to be read before they are believed."""
  outcomes = [comparison['outcome'] for comparison in study['comparisons']]
  order = [o for o in dict.fromkeys([*WORDS, *outcomes]) if o in outcomes]
  counts = [f'{outcomes.count(o)} {WORDS.get(o, o)}' for o in order]
  said = f'{numbers.many(len(outcomes), "comparison")}: {", ".join(counts)}.' if outcomes else ''
  caveats, failed = len(study['caveats']), len(_failures(study).rows)
  warnings = [numbers.many(caveats, 'caveat')] if caveats else []
  warnings += [f'{numbers.many(failed, "run")} without a result'] if failed else []
  more = f'Read with {" and ".join(warnings)}, below.' if warnings else ''
  return ' '.join(filter(None, [said or 'Nothing was compared.', more]))


def sections(study: Study) -> list[Section]:
  """All that comes after the verdicts and the plots."""
  failures = _failures(study)
  return [
    Section('Final numbers', [_final(study), Text(_FINAL)]),
    Section('Noise', [Text(sentence) for sentence in _noise(study)]),
    Section('What was held fixed', _fixed(study)),
    Section('Which numbers compare', _comparable(study)),
    Section('Caveats', [Bullets(study['caveats'])] if study['caveats'] else [Text('None known.')]),
    Section('Runs without a result', [failures] if failures.rows else [Text('None.')]),
    Section('Commands', _commands(study)),
    Section('Records', _records(study)),
  ]


# ------------------------------------------------------------------------------------- sections


_FINAL = (
  'Means and standard deviations are over the seeds that finished; steps, tokens, FLOPs and time '
  'are of one run; time is that of training, and the price that of all that a run does.'
)


def _final(study: Study) -> Table:
  seeds, number = _seeds(study), numbers.metric(study)
  columns = {  # those that no arm fills are left out
    'parameters': lambda arm: numbers.count(arm['parameters']),
    'steps': lambda arm: numbers.count(arm['steps']),
    'tokens': lambda arm: numbers.count(arm['tokens']),
    'FLOPs': lambda arm: numbers.large(arm['flops']),
    'FLOPs/token': lambda arm: numbers.large(arm['flops_per_token']),
    'tokens/s': lambda arm: numbers.count(arm['tokens_per_second']),
    'time': lambda arm: numbers.duration(arm['seconds']),
    'price': lambda arm: NOTHING if arm['price'] is None else f'{arm["price"]:,.2f}',
    'match': lambda arm: arm['remainder'] or NOTHING,
  }
  cells = {name: [cell(arm) for arm in study['arms']] for name, cell in columns.items()}
  cells = {name: cell for name, cell in cells.items() if set(cell) != {NOTHING}}
  rows = []
  for n, arm in enumerate(study['arms']):
    by_seed = {run['seed']: run for run in arm['runs']}
    values = [_value(by_seed.get(seed), number) for seed in seeds]
    spread = '' if arm['deviation'] is None else f' ± {number(arm["deviation"])}'
    rest = [cell[n] for cell in cells.values()]
    rows.append([arm['name'], number(arm['mean']) + spread, *values, *rest])
  head = [
    'arm',
    ', '.join(filter(None, ['mean', study['unit']])),
    *(f'seed {seed}' for seed in seeds),
    *cells,
  ]
  return Table(study['metric'], head, rows, numeric=True)


def _value(run: dict[str, Any] | None, number: Callable) -> str:
  if run is None:
    return NOTHING
  return number(run['value']) if run['status'] == 'finished' else run['status']


def _noise(study: Study) -> list[str]:
  noise, unit, number, said = study['noise'], numbers.unit(study), numbers.metric(study), []
  if noise['deviation'] is not None:
    said.append(
      f'Runs of one arm, which differ only in their seed, spread by {number(noise["deviation"])}'
      f'{unit} (standard deviation, pooled over arms).'
    )
  if noise['detectable'] is not None:
    said.append(
      f'A true difference of {number(noise["detectable"])}{unit} or more is found with a '
      f'probability of {study["power"]:g}, at a level of {study["alpha"]:g} for all comparisons '
      'together; smaller ones may be missed.'
    )
  gain = noise['pairing_gain']
  if gain is not None and gain < 1:
    said.append(f'Arms share their seeds, which has not helped (pairing gain {gain:.2g}).')
  elif gain is not None:
    said.append(
      f'Arms share their seeds, which makes the variance of a difference {gain:.3g} times smaller: '
      'without pairs it would take so many times the seeds.'
    )
  return said or ['How much chance alone would change cannot be told from single seeds.']


def _fixed(study: Study) -> list[Block]:
  fixed = study['fixed']
  moved = fixed['moved'].items()
  rows = [[key, 'yes' if key in fixed['named'] else 'no', _listed(x)] for key, x in moved]
  table = Table('Leaves of the config that moved', ['leaf', 'named', 'values'], rows)
  return [Bullets(fixed['lines']), *([table] if rows else [Text('No leaf of the config moved.')])]


def _listed(values: Any) -> str:
  return ', '.join(map(str, values)) if isinstance(values, list) else str(values)


def _comparable(study: Study) -> list[Block]:
  compared = [metric for metric, why in study['comparable'].items() if not why]
  apart = [f'{metric}: {why}' for metric, why in study['comparable'].items() if why]
  rows = [[arm['name'], *(_mean(arm, metric) for metric in compared)] for arm in study['arms']]
  blocks: list[Block] = []
  if compared:
    title = 'These compare; means over finished seeds'
    blocks.append(Table(title, ['arm', *compared], rows, numeric=True))
  if apart:
    blocks += [Text('These do not compare:'), Bullets(apart)]
  return blocks or [Text('No number is common to all arms.')]


def _mean(arm: dict[str, Any], metric: str) -> str:
  finished = [run['metrics'] for run in arm['runs'] if run['status'] == 'finished']
  values = [metrics[metric] for metrics in finished if metrics.get(metric) is not None]
  return f'{sum(values) / len(values):#.5g}' if values else NOTHING


def _failures(study: Study) -> Table:
  rows = [
    [arm['name'], str(run['seed']), run['status'], run['why'] or NOTHING, run['workdir']]
    for arm, run in _runs(study)
    if run['status'] != 'finished'
  ]
  return Table('Diverged and unfinished', ['arm', 'seed', 'status', 'why', 'workdir'], rows)


def _commands(study: Study) -> list[Block]:
  blocks: list[Block] = [Commands('The whole study', [study['command']])]
  for arm in study['arms']:
    lines = [arm['command'], *(run['command'] for run in arm['runs'])]
    blocks.append(Commands(arm['name'], list(dict.fromkeys(lines))))
  return blocks


def _records(study: Study) -> list[Block]:
  """What the runs were made with: once where it is the same for all, else by run."""
  records = {f'{arm["name"]}/{run["seed"]}': flatten(run['record']) for arm, run in _runs(study)}
  rows = []
  for key in dict.fromkeys(key for record in records.values() for key in record):
    runs: dict[str, list[str]] = {}
    for run, record in filter(lambda item: item[1], records.items()):
      runs.setdefault(str(record.get(key, 'not recorded')), []).append(run)
    most, *others = sorted(runs, key=lambda value: -len(runs[value]))
    rows.append([key, '; '.join([most, *(f'{x} in {", ".join(runs[x])}' for x in others)])])
  blocks: list[Block] = [Table('Code, versions and machine', ['', 'value'], rows)] if rows else []
  if without := [run for run, record in records.items() if not record]:
    blocks.append(Text(f'Without a record: {", ".join(without)}.'))
  return blocks


# ------------------------------------------------------------------------------------ comparisons


def _verdict(study: Study, comparison: dict[str, Any]) -> Verdict:
  reference, arm = comparison['arms']
  facts = [
    ('metric', comparison['metric']),
    ('difference', numbers.difference(study, comparison)),
    ('p, by Holm', numbers.p_value(comparison['p_holm'])),
    ('p, by itself', numbers.p_value(comparison['p_value'])),
    ('seeds', ', '.join(map(str, comparison['seeds'])) or 'none'),
  ]
  if comparison['pairing_gain'] is not None:
    facts.append(('pairing gain', f'{comparison["pairing_gain"]:.3g} ×'))
  if comparison['seeds_needed']:
    facts.append(('more seeds', f'{comparison["seeds_needed"]:,} needed'))
  facts = [(name, value) for name, value in facts if value != NOTHING]
  return Verdict(arm, reference, comparison['outcome'], comparison['verdict'], facts)


def _matched(study: Study) -> str:
  words = {'steps': 'number of steps', 'tokens': 'number of tokens', 'flops': 'FLOPs'}
  return (words | {'time': 'time of training'})[study['match']]


def _runs(study: Study) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
  return ((arm, run) for arm in study['arms'] for run in arm['runs'])


def _seeds(study: Study) -> list[int]:
  return sorted({run['seed'] for _, run in _runs(study)})
