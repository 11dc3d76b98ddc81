"""What a run was: versions, devices, fingerprints, ledger.  And what two runs differ in.

python -m lmjax.record diff DIR1 DIR2
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lmjax.errors import UserError

_PACKAGES = ('lmjax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def describe(fingerprints: Mapping[str, str], devices: list[str]) -> dict[str, Any]:
  """Everything but the config that decides a run's numbers, as JSON values."""
  return {
    **software(),
    'devices': devices,
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'data': dict(fingerprints),
  }


def software() -> dict[str, Any]:
  """The versions of what runs."""
  versions = {p: _version(p) for p in _PACKAGES} | {'python': platform.python_version()}
  return {'versions': versions, 'code': _commit()}


def check_data(workdir: epath.Path, digests: Mapping[str, str]) -> None:
  """Raises a UserError where the data are not what they were when the run was begun."""
  check_same_data(workdir, _read(workdir, 'record.json')['data'], digests)


def check_same_data(
  where: epath.Path, there: Mapping[str, str], digests: Mapping[str, str]
) -> None:
  """Raises a UserError where `digests` are not `there`, of what was begun or saved at `where`."""
  for name, now in digests.items():
    if there.get(name) != now:
      raise UserError(
        f'the data "{name}" changed since {where} was begun ({there.get(name)}, now {now})'
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
  for name in ('config.json', 'record.json'):
    a, b = (_read(directory, name) for directory in (first, second))
    for path, (x, y) in differences(a, b).items():
      yield f'{name.removesuffix(".json")}: {path}: {x!r} | {y!r}'
  ledgers = [_lines(directory, 'ledger.jsonl') for directory in (first, second)]
  yield from _first_difference('data', ledgers, lambda line: line['hash'])
  configs = [_read(directory, 'config.json') for directory in (first, second)]
  if len({c['log']['every'] for c in configs}) > 1:
    yield 'loss: not compared, since the means are over other numbers of steps (log.every)'
    return
  metrics = [_lines(directory, 'metrics.jsonl') for directory in (first, second)]
  yield from _first_difference('loss', metrics, lambda line: line.get('train/loss'))


def _first_difference(what: str, runs: list[list[dict]], value) -> Iterator[str]:
  a, b = ({line['step']: value(line) for line in run if value(line) is not None} for run in runs)
  steps = [step for step in sorted(a.keys() & b.keys()) if a[step] != b[step]]
  if steps:
    yield f'{what}: first differs at step {steps[0]}: {a[steps[0]]} | {b[steps[0]]}'


def _read(directory: epath.PathLike, name: str) -> dict[str, Any]:
  path = epath.Path(directory) / name
  if not path.exists():
    raise UserError(f'there is no run in {directory}: it has no {name}')
  return json.loads(path.read_text())


def _lines(directory: str, name: str) -> list[dict[str, Any]]:
  path = epath.Path(directory) / name
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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
    lines = list(diff(*sys.argv[2:]))
  except UserError as e:
    print(f'lmjax: {e}', file=sys.stderr)
    sys.exit(2)
  print('\n'.join(lines) or 'the runs differ in nothing that was recorded')


if __name__ == '__main__':
  main()
