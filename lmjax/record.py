"""What a run was: code, versions, machine, data, ledger.  And what two runs differ in.

python -m lmjax.record diff DIR1 DIR2
"""

import importlib.metadata
import itertools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lmjax import jsonio
from lmjax.errors import UserError
from lmjax.terminal import say

_CADENCES = ('log', 'checkpoint', 'evaluate')  # at each, losses so far are written
_SECTIONS = ('code', 'versions', 'machine', 'environment', 'parameters', 'seed', 'data', 'initial')
_VARIABLES = ('XLA_', 'JAX_', 'LIBTPU_', 'TPU_', 'CUDA_', 'NCCL_', 'LMJAX_')
_SECRET = re.compile('KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL', re.IGNORECASE)
_PACKAGES = ('lmjax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def describe(fingerprints: Mapping[str, str], about: Mapping[str, Any]) -> dict[str, Any]:
  """Everything but the config that decides a run's numbers, as JSON values.

  `about` is what is known only when devices are; variables that are named like secrets are masked.
  """
  ours = {key: value for key, value in os.environ.items() if key.startswith(_VARIABLES)}
  masked = {key: '***' if _SECRET.search(key) else value for key, value in ours.items()}
  return {**software(), **about, 'environment': masked, 'data': dict(fingerprints)}


def restarted(
  record: Mapping[str, Any], now: Mapping[str, Any], step: int, began: str
) -> dict[str, Any]:
  """The record with one start more, and what had changed then since the first one."""
  changed = differences({k: v for k, v in record.items() if k != 'restarts'}, now)
  start = {'step': step, 'began': began, 'changed': {k: list(pair) for k, pair in changed.items()}}
  return {**record, 'restarts': [*record.get('restarts', []), start]}


def software() -> dict[str, Any]:
  """The versions of what runs."""
  versions = {p: _version(p) for p in _PACKAGES} | {'python': platform.python_version()}
  return {'versions': versions, 'code': _commit()}


def check_data(workdir: epath.Path, digests: Mapping[str, str]) -> None:
  """Raises a UserError where the data are not what they were when the run was begun."""
  check_same_data(workdir, read(workdir, 'record.json')['data'], digests)


def check_same_data(
  where: epath.Path, there: Mapping[str, str], digests: Mapping[str, str]
) -> None:
  """Raises a UserError where `digests` are not `there`, of what was begun or saved at `where`."""
  for name, now in digests.items():
    if there.get(name, now) != now:  # an imported model has met no data
      raise UserError(
        f'the data "{name}" changed since {where} was begun ({there[name]}, now {now})'
      )


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for key, value in tree.items():
    nested = isinstance(value, Mapping)
    flat |= flatten(value, f'{prefix}{key}.') if nested else {prefix + key: value}
  return flat


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """The leaves in which two trees of JSON values differ, by dotted path."""
  a, b = flatten(a), flatten(b)
  return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def diff(first: str, second: str) -> Iterator[str]:
  """Lines that say what differs between two runs, the causes first; none if nothing does.

  Raises:
    UserError: one of the directories holds no run.
  """
  runs = (first, second)
  configs = [read(run, 'config.json') for run in runs]
  for path, (x, y) in differences(*configs).items():
    yield f'config: {path}: {x!r} | {y!r}'
  records = [read(run, 'record.json') for run in runs]
  for section in _SECTIONS:
    for path, (x, y) in differences(*({section: r.get(section)} for r in records)).items():
      yield f'record: {path}: {x!r} | {y!r}'
  starts = [[s['changed'] for s in r.get('restarts', []) if s['changed']] for r in records]
  if starts[0] != starts[1]:
    for run, record in zip(runs, records, strict=True):
      for start in record.get('restarts', []):
        for path, (x, y) in start['changed'].items():
          yield f'restart: {run} at step {start["step"]}: {path}: {x!r}, then {y!r}'
  decided = [lines(run, 'events.jsonl') for run in runs]
  if decided[0] != decided[1]:
    x, y = next(pair for pair in itertools.zip_longest(*decided) if pair[0] != pair[1])
    keys = ('event', 'step', 'batch', 'to', 'why')
    said = lambda e: ', '.join(f'{key} {e[key]}' for key in keys if key in e)
    x, y = (said(e) if e else 'none' for e in (x, y))
    yield f'event: the first that differs is {x} | {y}'
  ledgers = [lines(run, 'ledger.jsonl') for run in runs]
  whole = all(map(final_state, runs))  # of a run that is at work, the rest is still to come
  yield from _first_difference('ledger', ledgers, whole)
  if len({tuple(c.get(key, {}).get('every') for key in _CADENCES) for c in configs}) > 1:
    yield f'loss: not compared: the means are over other steps ({", ".join(_CADENCES)}: every)'
  else:
    metrics = [lines(run, 'metrics.jsonl') for run in runs]
    yield from _first_difference('loss', metrics, whole)
  x, y = map(final_state, runs)
  if x and y and x != y:
    yield f'state: the fingerprints at the end are {x} | {y}'


def final_state(run: str) -> str:
  """The fingerprint of the state of a finished run; '' of another."""
  there = (epath.Path(run) / 'result.json').exists()
  return read(run, 'result.json').get('state_fingerprint', '') if there else ''


def verdict(first: str, second: str) -> str:
  """What there is to say where `diff` finds nothing."""
  if (x := final_state(first)) and x == final_state(second):
    return f'the runs are the same: every batch, every loss, and the state at the end ({x})'
  last = [
    max((line['step'] for line in lines(run, 'ledger.jsonl')), default=0) for run in (first, second)
  ]
  return f'the runs differ in nothing that was recorded, up to step {min(last)}'


def _first_difference(what: str, runs: list[list[dict]], whole: bool) -> Iterator[str]:
  """Line for line and number for number, in order: none may be missing, and none there twice."""
  numbers = (
    [
      (line['step'], key, value)
      for line in run
      for key, value in sorted(line.items())
      if key != 'step' and not key.startswith('perf/')
    ]
    for run in runs
  )
  pairs = itertools.zip_longest(*numbers) if whole else zip(*numbers, strict=False)
  for a, b in pairs:
    if a != b:
      if a and b and a[:2] == b[:2]:
        yield f'{what}: first differs at step {a[0]}: {a[1]} {a[2]} | {b[2]}'
      else:
        x, y = (f'{n[1]} of step {n[0]}' if n else 'nothing more' for n in (a, b))
        yield f'{what}: not the same lines: {x} | {y}'
      return


def read(directory: epath.PathLike, name: str) -> dict[str, Any]:
  path = epath.Path(directory) / name
  if not path.exists():
    raise UserError(f'there is no run in {directory}: it has no {name}')
  return jsonio.read(path)


def lines(directory: epath.PathLike, name: str) -> list[dict[str, Any]]:
  return list(jsonio.read_lines(epath.Path(directory) / name))


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:  # lmjax run from a checkout, not installed
    return 'not installed'


def _commit() -> str:
  """The commit of the code, with '+' when files differ from it; '' outside a checkout."""
  here = os.path.dirname(os.path.abspath(__file__))
  command = ['git', '-C', here, 'describe', '--always', '--abbrev=40', '--dirty=+']
  try:
    return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
  except (OSError, subprocess.TimeoutExpired):
    return ''


def main() -> None:
  if '--help' in sys.argv:
    print(__doc__)
    return
  if len(sys.argv) != 4 or sys.argv[1] != 'diff':
    print(__doc__, file=sys.stderr)
    sys.exit(2)
  try:
    said = list(diff(*sys.argv[2:]))
  except UserError as e:
    say(str(e))
    sys.exit(2)
  print('\n'.join(said) or verdict(*sys.argv[2:]))
  if said and (x := final_state(sys.argv[2])) and x == final_state(sys.argv[3]):
    print(f'and yet the state at the end is the same ({x})')


if __name__ == '__main__':
  main()
