"""The command line: what every command does before and after its work."""

import contextlib
import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags

from lmjax import config, processes, terminal
from lmjax.errors import Restart, StorageError, UserError
from lmjax.terminal import say

_ENDS = {
  signal.SIGTERM: (Restart.exit_code, 'stopped by SIGTERM'),
  signal.SIGHUP: (Restart.exit_code, 'stopped by SIGHUP'),  # the terminal is gone
  signal.SIGINT: (130, 'interrupted'),
}
# A step allocates its temporaries anew.  By default glibc gives freed ones back to the system, and
# clearing them again takes a quarter of the CPU time of a small model on a CPU: Shakespeare on two
# cores trains at 13,700 instead of 8,900 tokens/s with these, which are read when a process begins.
MALLOC = {
  'MALLOC_ARENA_MAX': '1',
  'MALLOC_MMAP_THRESHOLD_': str(1 << 33),
  'MALLOC_TRIM_THRESHOLD_': str(1 << 33),
}
GRACE = 30  # seconds in which children save; schedulers give as much before they kill
_children: list[tuple[subprocess.Popen, bool]] = []  # and whether it saves
_beginning = threading.Lock()  # held by who begins a child, and by the end of this process
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}


def keep_freed_memory() -> None:
  """Begins the process again with MALLOC, unless the environment says otherwise."""
  if not MALLOC.keys() & os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | MALLOC)


def run(main: Callable[[], None], argv: list[str] | None = None) -> None:
  """Parses the flags and runs `main`; an exception that knows its exit code becomes a sentence."""
  terminal.outlive()
  argv = argv or sys.argv
  if {'-h', '--help', '--helpshort'} & set(argv):
    app.usage(shorthelp=True, exitcode=0)
  try:
    hear_signals()
    config.parse_flags(argv)
    main()
  except Exception as e:
    sys.exit(_explain(e))


def hear_signals() -> None:
  """From here on these signals end the process, at once and from a thread of their own.

  An exception that a handler raises is lost where Python is in a callback of its garbage collector,
  waits for what a library computes, and lets XLA crash where it compiles while Python goes.
  """
  ear, mouth = socket.socketpair()
  mouth.setblocking(False)
  signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
  for number in _ENDS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, lambda *_: None)
  threading.Thread(target=_listen, args=(ear, mouth), name='ends', daemon=True).start()


def _listen(ear: socket.socket, mouth: socket.socket) -> None:
  while heard := ear.recv(1):  # `mouth` is held, so that it is not closed
    if heard[0] in _ENDS:
      end(heard[0])


def end(number: int) -> NoReturn:
  """Ends all processes of this run, and those that this one has begun, as a signal asks for."""
  code, why = _ENDS[number]
  say(why)
  with _beginning:
    if any(saves for _, saves in _children):
      code = Restart.exit_code
      say('what is at work saves, and goes on with the same command')
    for process, saves in list(_children):
      _ask(process, saves)
    until = time.monotonic() + GRACE
    for process, _ in list(_children):
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0, until - time.monotonic()))
    processes.leave(code, why)


@contextlib.contextmanager
def child(argv: Sequence[str], saves: bool = False, **options: Any) -> Iterator[subprocess.Popen]:
  """A process that does not outlive what is inside, nor this process where a signal ends that.

  One that `saves` is then asked to stop and waited for; a terminal's ^C does not reach it.
  """
  with _beginning:
    process = subprocess.Popen(argv, start_new_session=saves, **options)
    _children.append((process, saves))
  try:
    yield process
  finally:
    _ask(process, saves)
    process.wait()
    _children.remove((process, saves))


def _ask(process: subprocess.Popen, saves: bool) -> None:
  """To end."""
  if saves:
    process.terminate()
  else:
    process.kill()


def end_with(parent: int) -> None:
  """This process is asked to stop when its parent, with this number, is gone, however it went."""
  of_its_end = 1  # PR_SET_PDEATHSIG of prctl(2), which Linux alone has
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(of_its_end, signal.SIGTERM)
  if os.getppid() != parent:
    raise Restart(f'process {parent}, which has started this one, is gone')


def _explain(error: BaseException) -> int:
  """Says on stderr what has ended a command; returns its exit code."""
  if hasattr(error, 'exit_code'):
    say(str(error))
    return error.exit_code
  if isinstance(error, OSError) and error.errno in _STORAGE:
    say(f'storage: {error}')
    return StorageError.exit_code
  traceback.print_exception(error)  # a bug of ours
  return 1


def define_process_flags() -> None:
  main = {'module_name': sys.argv[0]}  # whose flags --help shows
  where = 'HOST:PORT of process 0, where several processes meet.'
  flags.DEFINE_string('coordinator', '', where, **main)
  flags.DEFINE_integer('processes', None, 'How many there are.  TPU pods and SLURM say it.', **main)
  flags.DEFINE_integer('process', None, 'The number of this one, from 0.', **main)


@contextlib.contextmanager
def joined(about: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
  """In it, this process is one of those that the flags, SLURM or a TPU pod speak of, if any do.

  All must have been given equal values of everything in `about()`.  What one raises ends them all.
  """
  place = _asked() or processes.cluster()
  if place is None or place[1] == 1:
    yield
    return
  processes.start(*place, about())
  try:
    yield
    processes.finish()
  except BaseException as e:
    processes.fail(_explain(e), e)


def _asked() -> tuple[str, int, int] | None:
  """(coordinator, processes, process) of the command line."""
  f = flags.FLAGS
  given = (f.coordinator, f.processes, f.process)
  if given == ('', None, None):
    return None
  if '' in given or None in given:
    raise UserError('--coordinator, --processes and --process go together: give all three or none')
  host, _, port = f.coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise UserError(f'--coordinator={f.coordinator} is not HOST:PORT')
  if f.processes < 1:
    raise UserError(f'--processes={f.processes} must be at least 1')
  if not 0 <= f.process < f.processes:
    raise UserError(f'--process={f.process} is not one of 0 to {f.processes - 1} (--processes)')
  return given
