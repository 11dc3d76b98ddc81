"""The directory of a run: whose it is, and what it says of the run."""

import collections
import contextlib
import datetime
import fcntl
import os
import pathlib
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from lmjax import config as config_lib
from lmjax import fingerprint, jsonio, processes, record
from lmjax.errors import StorageError, UserError
from lmjax.experiment import Experiment

# What may differ when a run is taken up again: where and how it is computed, but not what.
FREE = ('cache', 'check', 'checkpoint', 'evaluate', 'guard', 'log', 'sharding')
FREE += ('model.attention', 'model.scan', 'model.remat')
# A file for beside a config.json, by which that is an experiment.
EXPERIMENT = """import json, pathlib
from ml_collections import ConfigDict
def get_config():
  return ConfigDict(json.loads(pathlib.Path(__file__).with_name('config.json').read_text()))
"""


def check(path: epath.Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
  """The result of a finished run, None where there is one to begin or to take up.

  Raises:
    UserError: the directory cannot be this run's, or not that of all its processes.
  """
  there, result = _read(path / 'config.json'), _read(path / 'result.json')
  if there:
    there = config_lib.resolve(there)  # keys that have come since are as they are by default
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
    jsonio.write(probe, {})
  except OSError as e:
    raise UserError(f'cannot write the run into {path}: {e.strerror or e}') from e
  processes.share('written')
  seen = processes.collect(probe.exists())
  if seen:
    probe.unlink(missing_ok=True)
  if not processes.share(seen and all(seen)):
    raise UserError(f'{path} is not the same for all: all hosts need one workdir together')
  return None


def on_disk(path: str | os.PathLike) -> pathlib.Path:
  """Absolute.  UserError for one in a bucket, where it is more than runs that are kept."""
  if '://' in os.fspath(path):
    raise UserError(f'{os.fspath(path)} is in a bucket: this is kept in a directory of a disk')
  return pathlib.Path(path).expanduser().absolute()


@contextlib.contextmanager
def owned(path: epath.Path) -> Iterator[None]:
  """Of all runs only one is in here.  When its process dies, however it does, another may come.

  Buckets and some network disks have no locks: there it is the user who sees to it.

  Raises:
    UserError: who is in here.
  """
  with contextlib.ExitStack() as stack:
    wrong = processes.share(_lock(path, stack) if processes.index() == 0 else None)
    if wrong:
      raise UserError(wrong)
    yield


def owner(path: epath.Path) -> str:
  """Who is at work in there; '' where nobody is, or it cannot be known."""
  with contextlib.ExitStack() as stack:
    return _lock(path, stack) if (path / '.lock').exists() else ''


def _lock(path: epath.Path, stack: contextlib.ExitStack) -> str:
  if '://' in str(path):
    return ''
  opened = os.open(path / '.lock', os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
  file = stack.enter_context(os.fdopen(opened, 'a+'))
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    return f'another run is at work in {path}: {file.read() or "begun just now"}'
  except OSError:
    return ''
  file.truncate(0)
  since = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
  print(f'process {os.getpid()} on {socket.gethostname()}, since {since}', end='', file=file)
  file.flush()
  return ''


def check_space(path: epath.Path, size: int, count: int) -> None:
  """Raises a StorageError where a local disk has no room for so many checkpoints of so many bytes.

  One more than are kept lies there while it is written, and they hardly compress.
  """
  wrong = ''
  if processes.index() == 0 and '://' not in str(path):
    free, count = shutil.disk_usage(path).free, max(1, count)
    if free < count * size:
      wrong = (
        f'{path} has {free / 1e9:.3g} GB free, and needs room for {count} more checkpoints '
        f'of {size / 1e9:.3g} GB (checkpoint.keep_last, and one while it is written)'
      )
  if wrong := processes.share(wrong):
    raise StorageError(wrong)


def describe(
  parts: Experiment,
  path: epath.Path,
  digests: Mapping[str, str],
  params: Any,
  step: int,
  among: int = 1,
) -> None:
  """Writes what the run is, once everything fits together; config.json, last, makes it a run.

  `params` are those that it begins with, and `among` so many runs it shares its machine.  Where it
  is a run already, what has changed until this start, at `step`, is added.
  """
  initial = {} if step else fingerprint.of(fingerprint.named(params))
  if processes.index() == 0:
    devices = jax.devices()
    about = {
      'config': parts.config,
      'machine': {
        'devices': dict(collections.Counter(f'{d.platform}:{d.device_kind}' for d in devices)),
        'driver': devices[0].client.platform_version,
        'processes': jax.process_count(),
        **({'runs': among} if among > 1 else {}),
      },
      'parameters': sum(x.size for x in jax.tree.leaves(params)),
      'initial': initial,
      'seed': parts.config['seed'],
    }
    now = record.describe(digests, about)
    before = _read(path / 'record.json') if (path / 'config.json').exists() else None
    if before:
      now['initial'] = before.get('initial', {})
      began = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
      now = record.restarted(before, now, step, began)
    if not before or not (path / 'tokenizer').exists():
      parts.tokenizer.save(path / 'tokenizer')
    jsonio.write(path / 'record.json', now)
  jsonio.write(path / 'config.json', parts.config)


def _read(path: epath.Path) -> dict[str, Any] | None:
  return jsonio.read(path) if path.exists() else None
