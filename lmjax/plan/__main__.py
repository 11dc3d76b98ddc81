"""Whether a run fits, how fast it will be and what it costs, on hardware that is not here:

  python -m lmjax.plan --config experiments/gpt2.py:small --topology v5e:4x4

Of several experiments (--config, more than once), of all arms of a sweep (--sweep), and on several
topologies, by default those that the experiment names.  Where it does not fit, what would.
"""

import json
import pathlib
import re
import sys

from absl import flags

from lmjax import command, config, hardware
from lmjax.config import Overrides
from lmjax.errors import UserError
from lmjax.plan import Entry, Job, jobs, made, plan
from lmjax.plan.measure import measure
from lmjax.plan.search import search

HEAD = ('GiB needed/there', 'TFLOP model', 'program', 'GiB moved', 'GiB sent', 'ms at least')
HEAD += ('bound by', 'tokens/s', 'MFU', 'hours', 'price')
LEGEND = """
Of a device and a step: memory, TFLOP, GiB to and from its memory, GiB sent, and the least time.
Of all devices: tokens/s at most, hours and price at least.  Behind an array: what shrinks it."""


def table(entries: list[Entry]) -> str:
  """For people: a line for each program, then what fills its memory and its wires."""
  rows = [HEAD, *map(_row, entries)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row, entry in zip(rows, [None, *entries], strict=True):
    lines += [f'\n{entry["config"]}  on  {entry["topology"]}'] if entry else []
    lines.append('  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    lines += _details(entry, few=len(entries) > 4) if entry else []
  hours, prices = ([e[key] for e in entries if e[key] is not None] for key in ('hours', 'price'))
  if len(hours) > 1 and len({entry['topology'] for entry in entries}) == 1:
    lines.append(f'\nall {len(hours)}: {sum(hours):,.3g} hours, one after the other')
    lines[-1] += f', price {sum(prices):,.2f}' if prices else ''
  return '\n'.join([*lines, LEGEND])


def _row(entry: Entry) -> tuple[str, ...]:
  memory, known = entry['memory_gib'], entry['step_seconds'] is not None
  peak = max(memory['peak'], memory['evaluation'] or 0)
  size = f'{peak:.2f}/{memory["capacity"]:.2f}' + ('' if entry['fits'] else ' DOES NOT FIT')
  if not known:
    return (size, f'{entry["model_tflop"]:.4g}', *('' for _ in HEAD[2:]))
  done = f'{entry["dot_tflop"] + entry["kernel_tflop"]:.4g} (x{entry["recomputation"]:.3f})'
  return (
    size,
    f'{entry["model_tflop"]:.4g}',
    done,
    f'{entry["hbm_gib"]:.1f}',
    f'{sum(entry["wire_gib"].values()):.3f}',
    f'{entry["step_seconds"] * 1e3:.3g}',
    entry['bound_by'],
    f'{entry["tokens_per_second"]:,.0f}',
    f'{entry["mfu"]:.1%}',
    f'{entry["hours"]:.3g}',
    '' if entry['price'] is None else f'{entry["price"]:,.2f}',
  )


# Between the modules in the name of an operation: what JAX did with them.
_INSIDE = re.compile(r'jit\(step\)/|(while|body|closed_call|checkpoint|rematted_computation)/')


def _details(entry: Entry, few: bool) -> list[str]:
  memory = entry['memory_gib']
  lines = [
    f'  {entry["parameters"]:,} parameters; arguments {memory["arguments"]:.2f} and temporaries '
    f'{memory["temporaries"]:.2f} GiB; compiled in {entry["compile_seconds"]:.0f} s'
  ]
  if 'overrides' in entry:
    found = ' '.join(entry['overrides'] or ())
    lines.append(f'  has room with {found}' if found else '  nothing that was tried has room')
  if entry['uncounted_loops']:
    lines.append(f'  {entry["uncounted_loops"]} loops of unknown length are counted once')
  if seen := entry.get('measured'):
    size = '' if seen['memory_gib'] is None else f', {seen["memory_gib"]:.2f} GiB'
    lines.append(
      f'  measured: {seen["step_seconds"] * 1e3:.3g} ms, {seen["tokens_per_second"]:,.0f} '
      f'tokens/s, MFU {seen["mfu"]:.1%}{size}'
    )
  wire = entry['wire_gib_by_axis'] or {}
  lines += (
    ['  sent along ' + ', '.join(f'{a}: {x:.3f} GiB' for a, x in wire.items())] if wire else []
  )
  for buffer in entry['largest'][: 1 if few else 4]:
    where = _INSIDE.sub('', buffer['where']) or 'what the compiler adds'
    lines.append(f'  {buffer["gib"]:.3f} GiB {buffer["array"]} {where} ({buffer["shrinks"]})')
  return lines


def _split(argv: list[str]) -> tuple[Overrides, list[str]]:
  """The values of --config.KEY=VALUE, or KEY VALUE, as they are written; the other arguments."""
  ours, rest, words = {}, [], iter(argv)
  for word in words:
    found = re.fullmatch(r'--?config[.]([^=]+)(=.*)?', word, re.DOTALL)
    if found:
      ours[found[1]] = found[2][1:] if found[2] else next(words, '')
    else:
      rest.append(word)
  return ours, rest


def main(overrides: Overrides) -> None:
  f = flags.FLAGS
  if not f.config:
    raise UserError('name an experiment with --config FILE.py[:ARGUMENT]')
  if f.measure and f.topology:
    raise UserError('--measure is for the devices that are here, and --topology for others')
  if 'here' in f.topology:
    raise UserError('the devices that are here are asked for with --measure')
  out = pathlib.Path(f.json or '.').absolute()
  if not out.parent.is_dir():
    raise UserError(f'there is no directory {out.parent} for --json')
  if f.json and out.is_dir():
    raise UserError(f'--json={f.json} is a directory')
  where = ['here'] if f.measure else f.topology
  todo = list(jobs(f.config, where, overrides, f.sweep, f.price_per_chip_hour))
  if f.measure and len(todo) > 1:
    raise UserError('--measure takes one experiment at a time: memory counts for the whole process')
  if not f.measure:
    hardware.prepare([job.topology for job in todo])
  entries, errors = planned(_possible(todo, bool(where)), f.measure)
  if entries:
    print(table(entries))
  if entries and f.json:
    out.write_text(json.dumps(entries, indent=2) + '\n')
  if errors and (where or not entries):
    raise errors[0]


def planned(todo: list[Job], measured: bool) -> tuple[list[Entry], list[UserError]]:
  """All that can be; a compiler that gives up for one does not lose the others."""
  entries, errors = [], []
  for job in todo:
    try:
      entries += _entries(job, measured)
    except UserError as e:
      errors.append(e)
      _remark(job, e)
  return entries, errors


def _remark(job: Job, error: UserError) -> None:
  print(f'{job.command} is not planned for {job.topology}: {error}', file=sys.stderr)


def _possible(todo: list[Job], asked: bool) -> list[Job]:
  """Before anything is compiled: a mistake, or, where nobody asked for the topology, a remark."""
  found, errors = [], {}
  for job in todo:
    try:
      made(job)
      found.append(job)
    except UserError as e:
      errors[job] = e
  if errors and (asked or not found):
    raise next(iter(errors.values()))
  for (where, said), job in {(j.topology, str(e)): j for j, e in errors.items()}.items():
    print(f'{job.spec} is not planned for {where}: {said}', file=sys.stderr)
  return found


def _entries(job: Job, measured: bool) -> list[Entry]:
  """Its own, and that of what has room where it has none."""
  entry = plan(job)
  if measured and entry['fits']:
    entry['measured'] = measure(job, entry)
  if measured or entry['fits']:
    return [entry]
  print('it has no room: looking for what has', file=sys.stderr, flush=True)
  instead = search(job)
  entry['overrides'] = config.arguments(instead[0]) if instead else None
  return [entry, instead[1]] if instead else [entry]


if __name__ == '__main__':
  flags.DEFINE_multi_string('config', [], 'The experiment: FILE.py[:ARGUMENT].')
  flags.DEFINE_multi_string('topology', [], 'Such as v5e:4x4, v5e:4x4@2 (slices), h100:8, cpu:8.')
  flags.DEFINE_bool('measure', False, 'Run 20 steps on the devices that are here as well.')
  flags.DEFINE_bool('sweep', False, 'All arms of the sweep() of the experiment.')
  flags.DEFINE_float('price_per_chip_hour', None, 'In any currency.', lower_bound=0)
  flags.DEFINE_string('json', '', 'A file for the numbers.')
  given, rest = _split(sys.argv)
  command.run(lambda: main(given), rest)
