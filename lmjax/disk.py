"""Arrays written to a directory and read from it by all processes together, with Orbax."""

import concurrent.futures
import functools
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from lmjax import processes
from lmjax.errors import StorageError
from lmjax.steps import Damaged

ELSEWHERE = 'another process could not save its part of a checkpoint'


_attempts = itertools.count(1)  # of this process to save, by which all know them
_newest = 0
_changed, _failed = threading.Condition(), set()
_left: list[threading.Thread] = []  # those that wait for a process that has failed


class Background:
  """Saves, one after the other, each in a thread; one that fails in one process has in all."""

  def __init__(self):
    self._attempt, self._saving, self._thread = 0, None, None
    processes.on('unsaved', _hear)

  @property
  def busy(self) -> bool:
    """Whether there is a save whose outcome nobody has asked for."""
    return self._saving is not None

  def begin(self, save: Callable[[int], None]) -> None:
    """Begins save(attempt), which raises StorageErrors; it waits where two are left to wait."""
    global _newest
    while len(alive := [thread for thread in _left if thread.is_alive()]) > 1:
      alive[0].join()  # each has a copy of the state
    _left[:] = alive
    self._attempt = _newest = next(_attempts)
    self._saving = concurrent.futures.Future()
    args = (save, self._attempt, self._saving)
    self._thread = threading.Thread(target=_run, args=args, name='checkpoint', daemon=True)
    self._thread.start()

  def outcome(self) -> str:
    """When the save under way has come to its end: why it failed, or ''."""
    saving, self._saving = self._saving, None
    if not saving:
      return ''
    with _changed:
      _changed.wait_for(lambda: saving.done() or self._attempt in _failed)
    if not saving.done():  # it waits for the other one, for 300 s, and there is no way to end it
      _left.append(self._thread)
      return ELSEWHERE
    try:
      saving.result()
    except StorageError as e:
      return str(e)
    return ''


def is_newest(attempt: int) -> bool:
  """Whether none has begun since, in this process."""
  return attempt == _newest


def _run(save: Callable[[int], None], attempt: int, saving: concurrent.futures.Future) -> None:
  try:
    save(attempt)
  except BaseException as e:
    _tell(attempt)
    saving.set_exception(e)
  else:
    saving.set_result(None)
  with _changed:
    _changed.notify_all()


def _hear(peer: int, attempt: int) -> None:
  _tell(attempt, but=peer)  # only process 0 is heard by all
  with _changed:
    _failed.add(attempt)
    _changed.notify_all()


def _tell(attempt: int, but: int | None = None) -> None:
  for peer in set(processes.peers()) - {but}:
    processes.tell(peer, 'unsaved', attempt)


def write(
  path: epath.Path, arrays: Mapping[str, jax.Array], manifest: dict[str, Any], attempt: int
) -> None:
  """Writes a step under another name and renames it once complete (in a bucket: marks it).

  Each has an `attempt` of its own: where one fails in one process, others still wait for it.
  With names of processes Orbax has them meet without the devices, which others use meanwhile.
  """
  meeting = ocp.options.MultiprocessingOptions(
    active_processes=set(range(jax.process_count())), barrier_sync_key_prefix=f's{attempt}'
  )
  options = ocp.CompositeOptions(multiprocessing_options=meeting)
  handler = ocp.CompositeCheckpointHandler(composite_options=options)
  args = ocp.args.Composite(
    state=ocp.args.PyTreeSave(traverse_util.unflatten_dict(arrays, sep='/')),
    meta=ocp.args.JsonSave(manifest),
  )
  with ocp.Checkpointer(handler, multiprocessing_options=meeting) as checkpointer:
    checkpointer.save(path, args=args)


def read(path: epath.Path, like: Mapping[str, Any]) -> dict[str, jax.Array]:
  """The arrays of a step, of the shapes, types and places of `like`.  Raises Damaged, at all."""
  item = traverse_util.unflatten_dict(dict(like), sep='/')
  how = ocp.checkpoint_utils.construct_restore_args(item)
  args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
  why, found = '', {}
  try:
    found = ocp.PyTreeCheckpointHandler().restore(path / 'state', args=args)
  except (jax.errors.JaxRuntimeError, MemoryError):  # no room for it here, which is not its fault
    raise
  except Exception as e:  # whatever Orbax and TensorStore make of a broken file
    why = first_line(e)
  # One process may be able to read its part where another is not.
  reasons = processes.share([r for r in processes.collect(why) or () if r])
  if reasons:
    raise Damaged(f'its arrays cannot be read: {reasons[0]}')
  return traverse_util.flatten_dict(found, sep='/')


def first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@functools.cache
def hush() -> None:
  """Keeps pages of Orbax from the user, who is told in a sentence what has failed."""
  logging.getLogger('absl').addFilter(_no_chatter)
  logging.getLogger('asyncio').addFilter(_no_chatter)  # of failed reads
  usual = sys.unraisablehook
  # Of a failed save, threads that come late to the loop that has waited for them.
  late = lambda e: isinstance(e, RuntimeError) and str(e) == 'Event loop is closed'
  sys.unraisablehook = lambda about: None if late(about.exc_value) else usual(about)


def _no_chatter(record: logging.LogRecord) -> bool:
  return record.levelno > logging.ERROR or 'orbax' not in record.pathname + record.getMessage()
