"""One save, one restore, from any mesh to any mesh, with Orbax; and nothing is believed unseen.

A checkpoint is `<directory>/<step>/`: the arrays in `state/`, and in `meta/` a manifest, which has
type, shape and fingerprint of every array.  It is written under another name and renamed (on object
stores: marked) once complete.  Orbax does not notice a flipped bit in an array, and takes an empty
directory for its newest step.  Here a step is one only if its manifest is whole and what was read
has the fingerprints that it says; any other is set aside in `quarantine/`.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from etils import epath

from lmjax import disk, fingerprint, offload, processes, steps
from lmjax.errors import StorageError, UserError
from lmjax.steps import Damaged, Steps
from lmjax.terminal import say


class Checkpoints(contextlib.AbstractContextManager):
  """The checkpoints of one run; every process of the run makes the same calls.

  Args:
    directory: a local path or a bucket (`gs://...`); created unless `read_only`.
    keep_last: how many of the newest steps to keep, at least 1.
    keep_every: steps divisible by it are kept for ever; of `regular`, the newest. 0 for none.
    keep_best: a metric such as 'validation/loss' whose best step is kept: the lowest, but the
      highest of one with 'accuracy' in its name. '' for none.
    read_only: nothing is created, moved or deleted, so that a running trainer can be watched.
    warn: is told, in words, of every step that is not what it should be.

  What fails in the background is raised by the next `save`, `wait` or `close`; `save` can be called
  again then. A process that ends without `close` loses the save in progress.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    keep_last: int = 2,
    keep_every: int = 0,
    regular: int = 0,
    keep_best: str = '',
    read_only: bool = False,
    warn: Callable[[str], None] = say,
  ):
    if keep_last < 1 or keep_every < 0:
      raise UserError(f'keep_last={keep_last} is below 1 or keep_every={keep_every} is below 0')
    self.directory = epath.Path(directory)
    if '://' not in str(directory):
      self.directory = self.directory.resolve()  # Orbax wants no relative one
    if read_only and not self.directory.is_dir():
      raise UserError(f'there is no checkpoint directory {self.directory}')
    self._keep_last, self._keep_every, self._regular = keep_last, keep_every, regular
    self._keep_best, self._read_only = keep_best, read_only
    self._steps = Steps(self.directory, read_only, warn)
    disk.hush()
    self._background = disk.Background()

  def save(
    self, step: int, state: Any, meta: dict, metrics: dict[str, float] | None = None
  ) -> None:
    """Saves `state` (a pytree of arrays) and `meta` (JSON); returns once the arrays are copied.

    Waits for the save before it. `metrics` are what `keep_best` chooses by.

    Raises:
      StorageError: the one before it could not be written.
    """
    assert not self._read_only
    self.wait()
    arrays = {name: steps.plain(x) for name, x in fingerprint.named(state).items()}
    if empty := [name for name, x in arrays.items() if not x.size]:
      raise ValueError(f'{empty[0]} has no elements, and Orbax saves no such array')
    copies = offload.copied(arrays)
    # Made here: what is no JSON must not fail, nor change, in another thread.
    manifest = steps.manifest(step, meta, metrics or {}, arrays, fingerprint.of(arrays))
    jax.block_until_ready(copies)
    self._background.begin(lambda attempt: self._write(copies, manifest, attempt))

  def restore(
    self, like: Any, step: int | None = None, *, cast: bool = False
  ) -> tuple[int, Any, dict] | None:
    """(step, state, meta) of a step, by default the newest that is whole; None where none ever was.

    `like` is a pytree of ShapeDtypeStructs with shardings, of any mesh; it alone says what comes
    back and where (without a sharding: as a NumPy array).  What is damaged is set aside; with
    `read_only` it is passed over.

    Raises:
      UserError: there is no such step, its arrays are others (of another type: unless `cast`), or
        it was written by a newer lmjax.
      StorageError: that step, or every one that there is, is damaged.
    """
    return self.restore_subtree('', like, step, cast=cast)

  def restore_subtree(
    self, path: str, like: Any, step: int | None = None, *, cast: bool = False
  ) -> tuple[int, Any, dict] | None:
    """`restore` of what was saved below a path such as 'opt_state/0/mu'; '' is the whole state."""
    self.wait()
    if step is not None:
      try:
        return self._read(step, path, like, cast)
      except Damaged as e:
        raise self._damaged(step, e) from e
    damaged = {}
    for step in reversed(processes.share(self.steps())):
      try:
        found = self._read(step, path, like, cast)
      except Damaged as e:
        damaged[step] = str(e)
        continue
      if processes.index() == 0:
        for other, why in damaged.items():
          self._steps.set_aside(str(other), why)
      processes.wait()
      return found
    # Where nothing can be read, it may be the reader's fault: all is left where it is.
    if damaged or processes.share(self._steps.any_aside()):
      what = '; '.join(f'{self._steps.path(step)}: {why}' for step, why in damaged.items())
      raise StorageError(
        f'no checkpoint in {self.directory} is whole, and a run does not begin again in silence: '
        f'{what or f"look at {self.directory / steps.QUARANTINE}"}'
      )
    return None

  def steps(self) -> list[int]:
    """The committed steps, ascending, as they are on the disk now."""
    return self._steps.all()

  def meta(self, step: int) -> dict:
    """What was saved as `meta`. UserError if there is no such step."""
    return self._manifest(step)['meta']

  def structure(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Path, shape and dtype of every array of a step (a typed key as its uint32 data)."""
    return steps.structure(self._manifest(step))

  def delete(self, unwanted: Callable[[int, dict], bool]) -> None:
    """Deletes the steps of which `unwanted(step, meta)` says so."""
    assert not self._read_only
    self.wait()
    if processes.index() == 0:
      for step, manifest in list(self._steps.manifests()):
        if unwanted(step, manifest['meta']):
          self._steps.delete(step)
    processes.wait()

  def average_path(self, step: int | None = None) -> str:
    """For `restore_subtree`: where a step has the moving average of the parameters, or 'params'."""
    if step is None:
      step = processes.share(next((step for step, _ in self._steps.manifests()), None))
    names = self.structure(step) if step is not None else {}
    found = (name.partition('/average/') for name in names if name.startswith('opt_state/'))
    return next((f'{above}/average' for above, here, _ in found if here), 'params')

  def best(self) -> int | None:
    """The step whose `keep_best` metric is best (the first of equals); None if none has it."""
    sign = -1 if 'accuracy' in self._keep_best else 1
    manifests = self._steps.manifests() if self._keep_best else ()
    known = [(sign * m['metrics'].get(self._keep_best, math.nan), step) for step, m in manifests]
    return min((pair for pair in known if math.isfinite(pair[0])), default=(0, None))[1]

  def wait(self) -> None:
    """Returns when the last save is committed and what it supersedes deleted.

    Raises:
      StorageError: it was not saved; what there is of it is removed.
    """
    if self._background.busy:
      # Where one process could not save its part, no process has saved.
      reasons = processes.share(
        [r for r in processes.collect(self._background.outcome()) or () if r]
      )
      if reasons:
        self._not_saved(min(reasons, key=lambda reason: reason == disk.ELSEWHERE))  # the cause

  def _not_saved(self, why: str) -> NoReturn:
    if processes.index() == 0:
      self._steps.remove_unfinished()  # the disk may be full of it
    raise StorageError(why)

  def close(self) -> None:
    """Waits for the last save, alone; needed before the process ends.

    Raises:
      StorageError: it was not saved.
    """
    if why := self._background.outcome():
      self._not_saved(why)

  def __exit__(self, *exception: object) -> None:
    self.close()

  # ------------------------------------------------------------------------------------- reading

  def _manifest(self, step: int) -> dict[str, Any]:
    """Raises UserError and StorageError."""
    try:
      return self._steps.manifest(step)
    except Damaged as e:
      raise self._damaged(step, e) from e

  def _damaged(self, step: int, why: Damaged) -> StorageError:
    return StorageError(f'checkpoint {self._steps.path(step)} is damaged: {why}')

  def _read(self, step: int, path: str, like: Any, cast: bool) -> tuple[int, Any, dict]:
    """Raises Damaged, at all processes; what does not fit is a UserError."""
    manifest = self._everyones_manifest(step)
    tree = jax.tree.structure(like)
    wanted = {'/'.join(filter(None, (path, k))): x for k, x in fingerprint.named(like).items()}
    plain = {name: steps.plain(x) for name, x in wanted.items()}
    stored = steps.structure(manifest)
    if path:
      stored = {name: x for name, x in stored.items() if f'{name}/'.startswith(f'{path}/')}
    if problems := steps.differences(plain, stored, any_dtype=cast):
      problems[3:] = [f'and {len(problems) - 3} more'] if problems[3:] else []
      raise UserError(f'checkpoint {self._steps.path(step)} does not fit: {"; ".join(problems)}')
    like = {name: x.update(dtype=stored[name].dtype) for name, x in plain.items()}
    found = disk.read(self._steps.path(step), like)
    prints = fingerprint.of(found)
    wrong = [name for name in wanted if prints[name] != manifest['arrays'][name][2]]
    # What one process alone holds, it alone has looked at.
    if wrong := processes.share(max(processes.collect(wrong) or [[]], key=len)):
      more = f' and {len(wrong) - 1} more' if wrong[1:] else ''
      raise Damaged(f'{wrong[0]}{more}: not what was saved')
    arrays = [steps.typed(found[name], x) for name, x in wanted.items()]
    return step, jax.tree.unflatten(tree, arrays), manifest['meta']

  def _everyones_manifest(self, step: int) -> dict[str, Any]:
    """As process 0 has read it: all take, or pass over, the same step."""
    manifest, error, why = None, '', ''
    if processes.index() == 0:
      try:
        manifest = self._steps.manifest(step)
      except (Damaged, UserError) as e:
        error, why = type(e).__name__, str(e)
    manifest, error, why = processes.share([manifest, error, why])
    if error:
      raise {'Damaged': Damaged, 'UserError': UserError}[error](why)
    return manifest

  # ------------------------------------------------------------------------------------- writing

  def _write(self, arrays: dict[str, jax.Array], manifest: dict[str, Any], attempt: int) -> None:
    """Saves a step and deletes what it supersedes."""
    step = manifest['step']
    assert step not in self.steps()
    try:
      if processes.index() == 0:
        self._steps.tidy()  # threads of a save that failed may have written on
      disk.write(self._steps.path(step), arrays, manifest, attempt)
    except Exception as e:
      why = f'checkpoint {step} could not be saved in {self.directory}: {disk.first_line(e)}'
      raise StorageError(why) from e
    if processes.index() == 0 and disk.is_newest(attempt):
      there = self.steps()
      keep = {self.best(), *there[-self._keep_last :]}
      keep |= {step for step in there if self._keep_every and step % self._keep_every == 0}
      keep |= set([step for step in there if self._regular and step % self._regular == 0][-1:])
      for step in set(there) - keep:
        self._steps.delete(step)
