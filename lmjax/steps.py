"""The directory of a run's checkpoints: which steps there are, and what each says of its arrays.

Beside the arrays of a step lies its manifest, by which one knows whether they are whole.
"""

import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lmjax import jsonio, processes
from lmjax.errors import StorageError, UserError
from lmjax.terminal import say

FORMAT = 1  # of a step's directory; every older one can be read as well
QUARANTINE = 'quarantine'


class Damaged(Exception):
  """What is wrong with a step, in words."""


class Steps:
  """The steps in a directory.  What is damaged is moved aside, or with `read_only` passed over."""

  def __init__(self, directory: epath.Path, read_only: bool, warn: Callable[[str], None] = say):
    self.directory, self._read_only, self._warn = directory, read_only, warn
    if not read_only and processes.index() == 0:
      directory.mkdir(parents=True, exist_ok=True)
      self.tidy()

  def tidy(self) -> None:
    """Removes what is unfinished, and sets aside what only looks like a step."""
    self.remove_unfinished()
    for path in _entries(self.directory):
      if _is_step(path.name) and not _is_whole(path):
        self.set_aside(path.name, 'it has no manifest')

  def path(self, step: int) -> epath.Path:
    return self.directory / str(step)

  def all(self) -> list[int]:
    """The committed steps, ascending, as they are on the disk now."""
    paths = (path for path in _entries(self.directory) if _is_step(path.name))
    return sorted(int(path.name) for path in paths if _is_whole(path))

  def manifest(self, step: int) -> dict[str, Any]:
    """What is known of the arrays of a step.

    Raises:
      UserError: there is no such step, or a newer lmjax has written it.
      Damaged: it is not what was written.
    """
    path = self.path(step)
    if not _is_whole(path):
      there = ', '.join(map(str, self.all())) or 'none'
      raise UserError(f'there is no checkpoint of step {step} in {self.directory} (there: {there})')
    try:
      if odd := _odd(path):
        raise Damaged(f'{odd} is neither a file nor a directory')
      manifest = jsonio.read(_manifest(path))
      said = manifest.pop('digest')
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as e:
      raise Damaged('its manifest cannot be read') from e
    if said != _digest(manifest):
      raise Damaged('its manifest is not what was written')
    if not {'step', 'format', 'meta', 'metrics', 'arrays'} <= manifest.keys():
      raise Damaged('its manifest lacks something')
    if manifest['step'] != step:
      raise Damaged(f'it is that of step {manifest["step"]}')
    if manifest['format'] > FORMAT:
      raise UserError(
        f'checkpoint {path} has format {manifest["format"]}, of a newer lmjax; this one reads '
        f'formats up to {FORMAT}'
      )
    return manifest

  def manifests(self) -> Iterator[tuple[int, dict[str, Any]]]:
    """Those that can be read, the newest first."""
    for step in reversed(self.all()):
      try:
        yield step, self.manifest(step)
      except Damaged:  # said when the step is needed
        continue

  def set_aside(self, name: str, why: str) -> None:
    """Moves a step out of the way, so that it can be looked at and is never taken for one."""
    path = self.directory / name
    if self._read_only:
      self._warn(f'checkpoint {path} is damaged ({why}): passed over')
      return
    aside = self.directory / QUARANTINE
    if os.path.islink(aside):
      raise StorageError(f'{aside} is a link: nothing is moved to where it leads')
    aside.mkdir(exist_ok=True)
    number = sum(p.name.partition('.')[0] == name for p in _entries(aside))
    place = aside / (f'{name}.{number}' if number else name)
    path.rename(place)
    self._warn(f'checkpoint {path} is damaged ({why}): moved to {place}')

  def any_aside(self) -> bool:
    return bool(_entries(self.directory / QUARANTINE))

  def delete(self, step: int) -> None:
    """Killed at any moment, what is left is not taken for a step."""
    path = self.path(step)
    try:
      if '://' in str(path):  # where to rename is to copy
        _manifest(path).unlink()
      else:
        path = path.rename(path.with_name(f'.deleting-{step}'))
      path.rmtree()
    except OSError as e:  # no reason to stop a run: the next start tries again
      self._warn(f'{path} could not be deleted: {e}')

  def remove_unfinished(self) -> None:
    """Frees what a save or a deletion that did not come to its end has left."""
    for path in _entries(self.directory):
      # In a bucket a step has its name from the beginning, and is marked when it is complete.
      begun = '://' in str(path) and _is_step(path.name) and not _is_whole(path)
      if begun or '.orbax-checkpoint-tmp' in path.name or path.name.startswith('.deleting-'):
        try:
          path.unlink() if os.path.islink(path) else path.rmtree()
        except OSError as e:  # where nothing can be removed, nothing can be saved, which says more
          self._warn(f'{path} could not be removed: {e}')


# ------------------------------------------------------------------------------------- manifests


def manifest(
  step: int,
  meta: Mapping[str, Any],
  metrics: Mapping[str, float],
  arrays: Mapping[str, jax.Array],
  fingerprints: Mapping[str, str],
) -> dict[str, Any]:
  """What is written beside arrays.  TypeError where `meta` is no JSON."""
  made = {
    'format': FORMAT,
    'step': step,
    'meta': meta,
    'metrics': {name: float(value) for name, value in metrics.items()},
    'arrays': {name: [*_kind(x), fingerprints[name]] for name, x in arrays.items()},
  }
  return json.loads(json.dumps(made | {'digest': _digest(made)}))


def structure(manifest: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """Path, shape and dtype of every array."""
  arrays = manifest['arrays'].items()
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape, _) in arrays}


def differences(
  wanted: Mapping[str, Any], stored: Mapping[str, Any], any_dtype: bool = False
) -> list[str]:
  """What keeps stored arrays from being those that are wanted, in words."""
  found = []
  for name in (name for name in wanted if name in stored):
    there, here = _kind(stored[name]), _kind(wanted[name])
    if there[1] != here[1] or (there != here and not any_dtype):
      there, here = (''.join(map(str, kind)) for kind in (there, here))
      found.append(f'{name} is {there} there and {here} here')
  found += [f'{name} is not in it' for name in wanted if name not in stored]
  return found + [f'{name} is only in it' for name in stored if name not in wanted]


def plain(x: Any) -> Any:
  """What is stored of an array, or of a ShapeDtypeStruct: of a typed key its numbers."""
  if not _is_key(x):
    return x
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.eval_shape(jax.random.key_data, x).update(sharding=x.sharding)
  return jax.random.key_data(x)


def typed(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  """What was stored, as the array that it was, or that it is wanted as."""
  if not _is_key(like):
    return x.astype(like.dtype, copy=False)
  kind = []
  jax.eval_shape(lambda key: kind.append(jax.random.key_impl(key)), like)  # wants a real one, or so
  return jax.random.wrap_key_data(x, impl=kind[0])


def _is_key(x: Any) -> bool:
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _kind(x: Any) -> tuple[str, list[int]]:
  return str(x.dtype), list(x.shape)


def _digest(manifest: Mapping[str, Any]) -> str:
  text = json.dumps(manifest, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _manifest(path: epath.Path) -> epath.Path:
  return path / 'meta' / 'metadata'


def _entries(directory: epath.Path) -> list[epath.Path]:
  try:
    return list(directory.iterdir())
  except FileNotFoundError:  # in a bucket, every empty one
    return []


def _odd(path: epath.Path) -> str:
  """What on a local disk may lead elsewhere or never end, as links and pipes do; '' without."""
  local = '://' not in str(path)
  below = (
    os.path.join(at, name) for at, *kinds in os.walk(path) for name in itertools.chain(*kinds)
  )
  plain = lambda mode: stat.S_ISREG(mode) or stat.S_ISDIR(mode)
  names = itertools.chain([str(path)], below) if local else ()
  return next((name for name in names if not plain(os.lstat(name).st_mode)), '')


def _is_step(name: str) -> bool:
  return re.fullmatch(r'0|[1-9]\d*', name) is not None


def _is_whole(path: epath.Path) -> bool:
  """Whether it looks like a committed step; whether it is one is known when it was read."""
  return path.is_dir() and ocp.path.step.is_path_finalized(path) and _manifest(path).exists()
