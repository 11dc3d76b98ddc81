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

# What may differ when a run is taken up again: where and how it is computed, but not what.
FREE = ('cache', 'checkpoint', 'evaluate', 'log', 'sharding')
FREE += ('model.attention', 'model.scan', 'model.remat')


def check(path: epath.Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
  """The result of a finished run, None where there is one to begin or to take up.

  Raises:
    UserError: the directory cannot be this run's, or not that of all its processes.
  """
  there, result = _read(path / 'config.json'), _read(path / 'result.json')
  if there:
    changed = record.differences(there, config)
    # Micro-batches draw noise of their own.
    noisy = any(k.endswith('dropout') and rate for k, rate in record.flatten(config).items())
    free = FREE if noisy else (*FREE, 'micro_batches')
    changed = {k: v for k, v in changed.items() if not {k, k.split('.')[0]} & set(free)}
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
  seen = processes.collect(probe.exists())
  if seen:
    probe.unlink(missing_ok=True)
  if not processes.share(seen and all(seen)):
    raise UserError(f'{path} is not the same for all: all hosts need one workdir together')
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
