"""The directory of a run: whose it is, and what it says of the run."""

import json
import uuid
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from lmjax import metrics, processes, record
from lmjax.config import UserError
from lmjax.experiment import Experiment

# What may differ when a run is taken up again: no parameter depends on it.
FREE = ('cache', 'checkpoint', 'evaluate', 'log', 'sharding')


def check(path: epath.Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
  """The result of a finished run, None where there is one to begin or to take up.

  Raises:
    UserError: the directory cannot be this run's, or not that of all its processes.
  """
  there, result = _read(path / 'config.json'), _read(path / 'result.json')
  if there:
    changed = record.differences(there, config)
    changed = {k: v for k, v in changed.items() if k.split('.')[0] not in FREE}
    if changed:
      what = '; '.join(f'{k} is {a!r} there and {b!r} here' for k, (a, b) in changed.items())
      raise UserError(f'{path} holds another experiment ({what}): choose another workdir')
  state = 'finished' if result else 'begun' if there else 'new'
  processes.check_same({f'the run in {path}': state})
  if result:
    return result
  probe = path / f'.probe-{processes.share(uuid.uuid4().hex[:8])}'
  try:
    path.mkdir(parents=True, exist_ok=True)
    metrics.write_json(probe, {})
  except OSError as e:
    raise UserError(f'cannot write the run into {path}: {e.strerror or e}') from e
  processes.share('written')
  if not probe.exists():
    raise UserError(f'{path} is not what process 0 calls so: all hosts need one workdir together')
  processes.wait()
  if processes.index() == 0:
    probe.unlink()
  return None


def describe(parts: Experiment, path: epath.Path, digests: Mapping[str, str]) -> None:
  """Writes what the run is, once everything fits together; config.json, last, makes it a run."""
  if processes.index() == 0 and not (path / 'config.json').exists():
    devices = [f'{d.platform}:{d.device_kind}' for d in jax.devices()]
    parts.tokenizer.save(path / 'tokenizer')
    metrics.write_json(path / 'record.json', record.describe(digests, devices))
  metrics.write_json(path / 'config.json', parts.config)


def _read(path: epath.Path) -> dict[str, Any] | None:
  return json.loads(path.read_text()) if path.exists() else None
