"""How a run is asked to stop, and by whom: SIGTERM, SIGHUP or SIGINT to any of its processes, or
Google's notice that it takes the machine of a TPU away.

All processes stop after the same step.  The one that is asked says so to process 0, which asks all
how far they are; these wait there until they hear which step is the last.
"""

import contextlib
import faulthandler
import http.client
import math
import os
import signal
import socket
import statistics
import sys
import threading
import time
import urllib.request
from typing import Any

import jax

from lmjax import command, processes
from lmjax.errors import Restart
from lmjax.terminal import say

RETRY = 10.0  # seconds until a metadata server that has not answered is asked again
BURST = 1.0  # seconds within which SIGTERMs are one
PATIENCE = 60.0  # seconds without a step, at least, before a run is taken for stuck


class Stop(contextlib.AbstractContextManager):
  """Inside, a first signal asks for a stop, a second is ignored, and a third ends the process.

  Before `begin` there is nothing to save, and the first signal ends all processes.
  """

  def __init__(self):
    self._changed, self._left = threading.Condition(), threading.Event()
    self._begun = self._waiting = False
    self._tick, self._last = 0, None
    self._count, self._name = 0, ''
    self._ticks: dict[int, int] = {}
    self._former: dict[int, Any] = {}

  def __enter__(self) -> 'Stop':
    processes.on('ask', lambda peer, name: self._ask(name))
    processes.on('where', self._say_where)
    processes.on('at', self._collect)
    processes.on('last', self._hear_last)
    if threading.current_thread() is threading.main_thread():
      # The thread hears of a signal at once; Python's handlers wait for the main thread, which may
      # be in the compiler or in a collective operation.
      self._ear, mouth = socket.socketpair()
      mouth.setblocking(False)
      self._former_fd = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
      self._mouth = mouth
      # A notebook's interrupt before there is anything to save is Python's; a command's ends it.
      self._interrupts = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
      self._former = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: None)}
      if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        self._former[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: None)
      self._thread = threading.Thread(target=self._listen, name='signals', daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._left.set()
    if self._former:
      signal.set_wakeup_fd(self._former_fd)
      for number, handler in self._former.items():
        signal.signal(number, handler)
      self._mouth.close()  # which ends the thread
      self._thread.join()
      self._ear.close()

  def begin(self) -> None:
    """From here on there is something to save.  All processes have come here before any goes on."""
    if self._former and not self._begun:
      self._former[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    if not self._begun and jax.default_backend() == 'tpu':
      threading.Thread(target=self._await_notice, name='preemption', daemon=True).start()
    self._begun = True
    processes.wait()

  def tick(self) -> bool:
    """Whether to stop here; all processes ask equally often, and all hear yes the same time."""
    with self._changed:
      self._tick += 1
      self._changed.wait_for(lambda: not self._waiting)
      return self._last is not None and self._tick >= self._last

  @property
  def begun(self) -> bool:
    return self._begun

  @property
  def reason(self) -> str:
    return self._name

  def _listen(self) -> None:
    since = -math.inf
    while heard := self._ear.recv(1):
      number = heard[0]
      if number == signal.SIGINT and not self._begun and self._interrupts:
        command.end(number)
      # Where a process has many threads, its end is told once for each, and schedulers repeat
      # themselves as well.
      late = time.monotonic() - since > BURST
      if number not in self._former or not (late or number == signal.SIGINT):
        continue
      since = time.monotonic()
      self._count += 1
      name = signal.Signals(number).name
      if not self._begun:
        say(f'stopped by {name} before the first step: nothing is lost; start it again')
        processes.leave(Restart.exit_code, f'stopped by {name}')
      if self._count == 1:
        self._ask(name)
        say(f'{name}: stopping after this step, which will be saved')
      if self._count > 2:
        say(f'{name} for the third time: leaving at once, without what is not saved yet')
        os._exit(Restart.exit_code)

  def _await_notice(self) -> None:
    """Asks the machine's metadata server, which answers when that changes or a minute is over."""
    host = os.environ.get('GCE_METADATA_HOST', 'metadata.google.internal')
    url, known = f'http://{host}/computeMetadata/v1/instance/preempted', ''
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while not self._left.is_set():
      noticed = False
      try:
        request = urllib.request.Request(url + known, headers={'Metadata-Flavor': 'Google'})
        with direct.open(request, timeout=90) as answer:
          noticed = answer.read(16).strip() == b'TRUE'
          tag = answer.headers['ETag']
      except (OSError, http.client.HTTPException):
        tag = None
      # Without an answer there is still the signal, a little later.
      known = f'?wait_for_change=true&timeout_sec=60&last_etag={tag}' if tag else ''
      if noticed and not self._left.is_set():
        say('this machine is to be taken away: stopping after this step, which will be saved')
        self._ask('a preemption notice')
        return
      if not tag:
        self._left.wait(RETRY)

  def _ask(self, name: str) -> None:
    if processes.index():
      processes.tell(0, 'ask', name)
      return
    with self._changed:
      if self._name:
        return
      self._name = name
    for peer in processes.peers():
      processes.tell(peer, 'where', name)
    self._say_where(0, name)

  def _say_where(self, peer: int, name: str) -> None:
    with self._changed:
      self._name, self._waiting = name, True
      tick = self._tick
    if processes.index():
      processes.tell(0, 'at', tick)
    else:
      self._collect(0, tick)

  def _collect(self, peer: int, tick: int) -> None:
    with self._changed:
      self._ticks[peer] = tick
      if len(self._ticks) <= len(processes.peers()):
        return
      last = max(self._ticks.values()) + 1
    for other in processes.peers():
      processes.tell(other, 'last', last)
    self._hear_last(0, last)

  def _hear_last(self, peer: int, last: int) -> None:
    with self._changed:
      self._last, self._waiting = last, False
      self._changed.notify_all()


class Watchdog(contextlib.AbstractContextManager):
  """Ends all processes when a step takes ten times as long as steps do, and at least `patience`.

  The first has nothing to be measured by, and ten times the patience.
  """

  def __init__(self, patience: float = PATIENCE):
    self._patience = patience
    self._seconds: list[float] = []
    self._since: float | None = None
    self._closed = threading.Event()

  def __enter__(self) -> 'Watchdog':
    threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()

  def step(self) -> None:
    """A step begins, and the one before it, if there was one, is over."""
    self.rest()
    self._since = time.monotonic()

  def rest(self) -> None:
    """A step is over; what comes until the next one takes as long as it takes."""
    since, self._since = self._since, None
    if since is not None:
      self._seconds = [*self._seconds[-99:], time.monotonic() - since]

  def _limit(self) -> float:
    usual = statistics.median(self._seconds) if self._seconds else self._patience
    return max(self._patience, 10 * usual)

  def _watch(self) -> None:
    while not self._closed.wait(min(1.0, self._patience / 10)):
      since, limit = self._since, self._limit()
      if since is not None and time.monotonic() - since > limit:
        why = f'a step has taken more than {limit:.0f} s: stuck; start it again'
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        say(why)
        processes.leave(Restart.exit_code, why)
