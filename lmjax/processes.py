"""Several processes, one run: who they are, that all have come, and what they tell each other.

`jax.distributed` joins their devices, but it aborts without a word where a process does not come,
and where one fails the others wait for it.  So every process first calls process 0, at the address
where JAX's own service will be, and says who it is and what it was asked to do.  The line stays
open: over it go a few numbers in JSON, and the news that a process has failed or is gone.
"""

import contextlib
import json
import os
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from lmjax import rollcall
from lmjax.errors import ProcessLost, UserError
from lmjax.rollcall import ARRIVAL
from lmjax.terminal import flush, say

# JAX takes a host for lost after so many seconds of silence, which a migrating machine or a switch
# that fails over may need.  A process that dies is noticed at once, as its line is closed.
HEARTBEAT = 30
SHUTDOWN = 10  # all have said that they are done when this begins
# One that is stopped or whose network is gone says nothing, and neither does its connection.
PULSE, SILENCE = 2, 12  # seconds between signs of life, and without one until it is taken for lost

_line: '_Line | None' = None


def start(
  coordinator: str, count: int, index: int, about: Mapping[str, Any], seconds: float = ARRIVAL
) -> None:
  """Meets the other processes and initialises jax.distributed; before any device is touched.

  From here on only process 0 has something to say on stdout.

  Raises:
    ProcessLost: who did not come, `seconds` after process 0, or after this one, was there.
    UserError: two processes with one number, or that were not asked to do the same.
  """
  global _line
  hello = {'process': index, 'processes': count, 'host': socket.gethostname(), 'about': about}
  hello = json.loads(json.dumps(hello))
  hosts, ends = (rollcall.answer if index else rollcall.hold)(coordinator, hello, seconds)
  _line = _Line(index, hosts, ends)
  if index:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what C++ says as well
  import jax

  # With it SIGTERM would end nothing: JAX would keep it for someone who asks.
  jax.config.update('jax_enable_preemption_service', False)
  wait()  # for those who read JAX from a slow disk
  jax.distributed.initialize(
    coordinator,
    count,
    index,
    local_device_ids=_own_device(hosts, index),
    cluster_detection_method='deactivate',
    initialization_timeout=ARRIVAL,
    heartbeat_timeout_seconds=HEARTBEAT,
    shutdown_timeout_seconds=SHUTDOWN,
  )


def fail(code: int, error: BaseException) -> NoReturn:
  """Ends all processes, this one at once: Python's way out is JAX's, which waits for the others."""
  bug = ''.join(traceback.format_exception(error)).strip()
  leave(code, str(error) if hasattr(error, 'exit_code') else bug)


def leave(code: int, why: str) -> NoReturn:
  """Ends all processes at once, from any thread."""
  if _line:
    _line.fail(code, f'process {_line.index} ({_line.hosts[_line.index]}) stopped: {why}')
  flush()
  os._exit(code)


def finish() -> None:
  """Leaves jax.distributed when all processes have come here."""
  import jax

  wait()
  _line.closing = True
  jax.distributed.shutdown()


def _own_device(hosts: list[str], index: int) -> list[int] | None:
  """One GPU for each task, where SLURM shows the tasks on a host as many as they are."""
  here = hosts.count(hosts[index])
  visible = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
  alone = here == 1 or len(visible) != here or 'SLURM_STEP_NUM_TASKS' not in os.environ
  return None if alone else [hosts[:index].count(hosts[index])]


def cluster() -> tuple[str, int, int] | None:
  """(coordinator, processes, process) of a SLURM job step or a TPU pod, None outside of them.

  JAX finds these out as well, but keeps it to itself, hence its private names; and it takes the
  tasks of a whole SLURM allocation for processes, of which a shell or a batch script is only one.
  """
  slurm = int(os.environ.get('SLURM_STEP_NUM_TASKS', '1')) > 1
  if not slurm and 'tpu' not in os.environ.get('JAX_PLATFORMS', 'tpu'):
    return None
  from jax._src import clusters

  if slurm:
    found = clusters.SlurmCluster
  elif clusters.GkeTpuCluster.is_env_present():
    found = clusters.GkeTpuCluster
    workers = found._get_worker_list_in_slice()
    if len(workers) == 1 and 'MEGASCALE_NUM_SLICES' not in os.environ:
      return None  # a notebook's machine, where the next question would go to the network
  elif clusters.GceTpuCluster.is_env_present():  # asks the network only on a machine with TPUs
    found = clusters.GceTpuCluster
  else:
    return None
  count = found.get_process_count()
  if count == 1:
    return None
  port = os.environ.get('JAX_COORDINATOR_PORT')
  return found.get_coordinator_address(ARRIVAL, port), count, found.get_process_id()


# ------------------------------------------------------------------------ what they tell each other


def check_joined() -> None:
  """Raises a UserError where someone else has joined processes: these would not be told apart."""
  import jax

  ours = len(_line.hosts) if _line else 1
  if jax.process_count() != ours:
    raise UserError(
      f'jax.distributed has {jax.process_count()} processes, of which lmjax knows {ours}: instead '
      'of jax.distributed.initialize call lmjax.processes.start'
    )


def index() -> int:
  """The number of this process.  Asking JAX would start its backend."""
  return _line.index if _line else 0


def collect(value: Any) -> list[Any] | None:
  """At process 0: the value of every process, in order; elsewhere None, at once.  JSON values."""
  if _line is None:
    return [value]
  if _line.index:
    _line.send(0, {'value': value})
    return None
  return [
    json.loads(json.dumps(value)),
    *(_line.inbox[peer].get() for peer in range(1, len(_line.hosts))),
  ]


def share(value: Any) -> Any:
  """Process 0's value, at every process."""
  if _line is None:
    return value
  if _line.index:
    return _line.inbox[0].get()
  for peer in _line.ends:
    _line.send(peer, {'value': value})
  return value


def peers() -> list[int]:
  """Those that this process can tell something: process 0 all others, and these process 0."""
  return sorted(_line.ends) if _line else []


def on(kind: str, hear: Callable[[int, Any], None]) -> None:
  """Calls hear(peer, value) in a thread of its own for what others `tell` of this kind."""
  if _line:
    _line.hear[kind] = hear


def tell(peer: int, kind: str, value: Any) -> None:
  """Sends a JSON value, which the other's main thread need not wait for."""
  _line.send(peer, {kind: value})


def wait() -> None:
  """Returns when all processes have come here."""
  share(collect(None) and None)


def check_same(values: Mapping[str, Any]) -> None:
  """Raises a UserError at every process where one has another value of something."""
  found = collect(dict(values))
  if wrong := share(_line and found and rollcall.difference(found, _line.hosts)):
    raise UserError(wrong)


class _Line:
  """The connections: process 0 has one with every other process, and these have that one."""

  def __init__(self, index: int, hosts: list[str], ends: dict[int, rollcall.End]):
    self.index, self.hosts, self.ends = index, hosts, ends
    self.inbox = {peer: queue.SimpleQueue() for peer in ends}
    self.hear = {'value': lambda peer, value: self.inbox[peer].put(value), 'alive': lambda *_: None}
    self.closing = False
    self._heard, self._silent = dict.fromkeys(ends, time.monotonic()), set()
    self._leaving, self._sending = threading.Lock(), threading.Lock()
    start = lambda *args: threading.Thread(target=args[0], args=args[1:], daemon=True)
    self._threads = {peer: start(self._listen, peer) for peer in ends}
    for thread in (*self._threads.values(), start(self._pulse)):
      thread.start()

  def send(self, peer: int, message: Any) -> None:
    with self._sending, contextlib.suppress(OSError):  # who is gone is noticed where it is heard
      self.ends[peer].send(message)

  def fail(self, code: int, why: str) -> NoReturn:
    """Tells the others, and ends this process."""
    self._leaving.acquire()
    self._leave(code, why)

  def _listen(self, peer: int) -> None:
    failed = (75, f'process {peer} ({self.hosts[peer]}) has ended without a word')
    with contextlib.suppress(OSError):
      for text in self.ends[peer].lines:
        self._heard[peer] = time.monotonic()
        ((kind, value),) = json.loads(text).items()
        if kind == 'failed':
          failed = value
          break
        self.hear[kind](peer, value)
    self._lost(*failed)

  def _pulse(self) -> None:
    began = time.monotonic()
    while not self.closing:
      time.sleep(PULSE)
      for peer in self.ends:
        self.send(peer, {'alive': None})
      before, began = began, time.monotonic()
      if began - before > 2 * PULSE:  # it was this process that did nothing
        self._heard = dict.fromkeys(self._heard, began)
      self._silent = {peer for peer, heard in self._heard.items() if began - heard > SILENCE}
      for peer in self._silent:
        who = f'process {peer} ({self.hosts[peer]})'
        self._lost(75, f'{who} has not been heard of for {SILENCE} s')

  def _lost(self, code: int, why: str) -> None:
    # A bug there may be a fault of its machine: who has none may be started again.
    code = ProcessLost.exit_code if code == 1 else code
    # The main thread may be inside a collective operation, where no exception reaches it.
    if not self.closing and self._leaving.acquire(blocking=False):
      say(why)
      self._leave(code, why)

  def _leave(self, code: int, why: str) -> NoReturn:
    for peer in self.ends:
      self.send(peer, {'failed': (code, why)})
    if self.index == 0:  # goes last: JAX aborts the others when its service is gone
      deadline = time.monotonic() + 5
      for peer, thread in self._threads.items():
        if thread is not threading.current_thread() and peer not in self._silent:
          thread.join(max(0.0, deadline - time.monotonic()))
    flush()
    os._exit(code)
