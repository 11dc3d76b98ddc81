"""One save, one restore, from any mesh to any mesh, with Orbax.

A checkpoint is `<directory>/<step>/` with the arrays in `state/` and a JSON document in `meta/`. It
is written under another name and renamed (on object stores: marked) once complete. Without its
meta a directory is no checkpoint.
"""

import concurrent.futures
import contextlib
import json
import logging
import math
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from lmjax import processes
from lmjax.config import UserError


def _no_chatter(record: logging.LogRecord) -> bool:
  return record.levelno >= logging.ERROR or 'orbax' not in record.pathname


class Checkpoints(contextlib.AbstractContextManager):
  """The checkpoints of one run; every process of the run makes the same calls.

  Args:
    directory: a local path or a bucket (`gs://...`); created unless `read_only`.
    keep_last: how many of the newest steps to keep, at least 1.
    keep_every: steps divisible by it are kept for ever; 0 for none.
    keep_best: a metric such as 'validation/loss' whose best step is kept: the lowest, but the
      highest of one with 'accuracy' in its name. '' for none.
    read_only: nothing is created, cleaned or deleted, so that a running trainer can be watched.

  What fails in the background is raised by the next `save`, `wait` or `close`. A process that ends
  without `close` loses the save in progress.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    keep_last: int = 2,
    keep_every: int = 0,
    keep_best: str = '',
    read_only: bool = False,
  ):
    if keep_last < 1 or keep_every < 0:
      raise UserError(f'keep_last={keep_last} is below 1 or keep_every={keep_every} is below 0')
    self.directory = epath.Path(directory)
    if read_only and not self.directory.is_dir():
      raise UserError(f'there is no checkpoint directory {self.directory}')
    self._keep_last, self._keep_every, self._keep_best = keep_last, keep_every, keep_best
    self._read_only = read_only
    logging.getLogger('absl').addFilter(_no_chatter)
    # Orbax is given no policy: it chooses what to delete before the new step is committed, counts
    # directories that are no checkpoints, and a kill during its deletion leaves a plausible step.
    # Directories are made at once: where that fails in the background, threads wait for them.
    options = {'async_options': ocp.AsyncOptions(create_directories_asynchronously=False)}
    options |= {'read_only': read_only, 'create': not read_only}
    options = ocp.CheckpointManagerOptions(**options, cleanup_tmp_directories=not read_only)
    self._manager = ocp.CheckpointManager(self.directory, options=options)
    self._background = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._retention: concurrent.futures.Future | None = None

  def save(
    self, step: int, state: Any, meta: dict, metrics: dict[str, float] | None = None
  ) -> None:
    """Saves `state` (a pytree of arrays) and `meta` (JSON); returns once the arrays are copied.

    Waits for the save before it. `metrics` are what `keep_best` chooses by.
    """
    assert not self._read_only
    self.wait()
    # Serialised here: what is no JSON must not fail, nor change, in another thread.
    numbers = {name: float(value) for name, value in (metrics or {}).items()}
    document = json.loads(json.dumps({'meta': meta, 'metrics': numbers}))
    arrays = traverse_util.unflatten_dict(_flat(state), sep='/')
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(document))
    if step in self._manager.all_steps():
      self._manager.reload()  # its list is of the past
      if step in self._manager.all_steps() and step not in self.steps():
        self._manager.delete(step)
    # Without force Orbax returns False for a step before its newest and saves nothing.
    saved = self._manager.save(step, args=args, force=True)
    assert saved
    self._retention = self._background.submit(self._retain)

  def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict] | None:
    """(step, state, meta) of a step, the newest by default; None where there is no checkpoint.

    `like` is a pytree of ShapeDtypeStructs with shardings, of any mesh; it alone says what comes
    back and where (without a sharding: as a NumPy array). UserError if there is no such step or
    its arrays are others.
    """
    return self.restore_subtree('', like, step)

  def restore_subtree(
    self, path: str, like: Any, step: int | None = None
  ) -> tuple[int, Any, dict] | None:
    """`restore` of what was saved below a path such as 'opt_state/0/mu'; '' is the whole state."""
    self.wait()
    step = self._newest() if step is None else step
    if step is None:
      return None
    wanted, stored = _flat(like, path), self.structure(step)
    if path:
      stored = {name: x for name, x in stored.items() if f'{name}/'.startswith(f'{path}/')}
    if problems := _differences(wanted, stored):
      problems[3:] = [f'and {len(problems) - 3} more'] if problems[3:] else []
      where = f'checkpoint {self.directory / str(step)}'
      raise UserError(f'{where} does not fit: {"; ".join(problems)}')
    item = traverse_util.unflatten_dict(wanted, sep='/')
    how = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
    found = self._manager.restore(step, args=ocp.args.Composite(state=args))['state']
    found = traverse_util.flatten_dict(found, sep='/')
    assert all(found[name].dtype == x.dtype for name, x in wanted.items())
    return (
      step,
      jax.tree.unflatten(jax.tree.structure(like), [found[n] for n in wanted]),
      self.meta(step),
    )

  def steps(self) -> list[int]:
    """The committed steps, ascending, as they are on the disk now."""
    found = ocp.path.step.standard_name_format().find_all(self.directory)
    return sorted(x.step for x in found if self._document_path(x.step).exists())

  def _newest(self) -> int | None:
    """The same for all processes, whatever a host remembers of a disk in the network."""
    return processes.share(max(self.steps(), default=None))

  def meta(self, step: int) -> dict:
    """What was saved as `meta`. UserError if there is no such step."""
    return self._document(step)['meta']

  def structure(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Path, shape and dtype of every array of a step (a typed key as its uint32 data)."""
    self._document(step)
    tree = ocp.PyTreeCheckpointHandler().metadata(self.directory / str(step) / 'state').tree
    flat = traverse_util.flatten_dict(tree, sep='/')
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()}

  def average_path(self, step: int | None = None) -> str:
    """For `restore_subtree`: where a step has the moving average of the parameters, or 'params'."""
    step = self._newest() if step is None else step
    names = self.structure(step) if step is not None else {}
    found = (name.partition('/average/') for name in names if name.startswith('opt_state/'))
    return next((f'{above}/average' for above, here, _ in found if here), 'params')

  def best(self) -> int | None:
    """The step whose `keep_best` metric is best (the first of equals); None if none has it."""
    sign = -1 if 'accuracy' in self._keep_best else 1
    metrics = {step: self._document(step)['metrics'] for step in self.steps() if self._keep_best}
    known = [(sign * m.get(self._keep_best, math.nan), step) for step, m in metrics.items()]
    return min((pair for pair in known if math.isfinite(pair[0])), default=(0, None))[1]

  def wait(self) -> None:
    """Returns when the last save is committed and what it supersedes deleted; raises its error."""
    try:
      self._manager.wait_until_finished()
    except BaseException:
      self._remove_unfinished()
      raise
    finally:
      retention, self._retention = self._retention, None
      if retention:
        retention.result()

  def close(self) -> None:
    """`wait`, then ends all threads; needed before the process ends."""
    try:
      self.wait()
    finally:
      self._background.shutdown()
      self._manager.close()
      self._remove_unfinished()

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _document_path(self, step: int) -> epath.Path:
    return self.directory / str(step) / 'meta' / 'metadata'

  def _document(self, step: int) -> dict:
    if not self._document_path(step).exists():
      there = ', '.join(map(str, self.steps())) or 'none'
      raise UserError(f'there is no checkpoint of step {step} in {self.directory} (there: {there})')
    return json.loads(self._document_path(step).read_text())

  def _retain(self) -> None:
    try:
      self._manager.wait_until_finished()
    except BaseException:  # the caller's thread gets it from its own wait
      return
    if jax.process_index() == 0:
      steps = self.steps()
      keep = {self.best(), *steps[-self._keep_last :]}
      keep |= {step for step in steps if self._keep_every and step % self._keep_every == 0}
      for step in set(steps) - keep:
        # The meta first: killed in between, what is left is not taken for a checkpoint.
        self._document_path(step).parent.rmtree()
        (self.directory / str(step)).rmtree()

  def _remove_unfinished(self) -> None:
    """Frees the disk that a failed save has filled."""
    if jax.process_index() == 0 and not self._read_only:
      for path in self.directory.glob('*.orbax-checkpoint-tmp*'):
        path.rmtree()


def _flat(tree: Any, path: str = '') -> dict[str, Any]:
  names = {
    jax.tree_util.keystr(p, simple=True, separator='/'): x
    for p, x in jax.tree.leaves_with_path(tree)
  }
  return {'/'.join(filter(None, (path, name))): x for name, x in names.items()}


def _differences(wanted: dict[str, Any], stored: dict[str, Any]) -> list[str]:
  def kind(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.eval_shape(jax.random.key_data, x)
    return f'{x.dtype}{list(x.shape)}'

  kinds = {name: (kind(stored[name]), kind(wanted[name])) for name in wanted if name in stored}
  found = [f'{name} is {a} there and {b} here' for name, (a, b) in kinds.items() if a != b]
  found += [f'{name} is not in it' for name in wanted if name not in stored]
  return found + [f'{name} is only in it' for name in stored if name not in wanted]
