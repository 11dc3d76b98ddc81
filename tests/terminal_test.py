"""What is printed where nobody may be."""

import os
import signal
import subprocess
import sys

import pytest

from lmjax import terminal

OUTLIVE = 'import os, signal, sys\nfrom lmjax import terminal\nterminal.outlive()\n'


def test_what_is_said_to_nobody_is_no_error(monkeypatch):
  with open('/dev/full', 'w') as full:
    monkeypatch.setattr(sys, 'stderr', full)
    terminal.say('x')
    terminal.flush()
    full.write('held back')
    terminal.flush()
    monkeypatch.undo()
    with pytest.raises(OSError, match='No space left'):
      full.close()
  monkeypatch.setattr(sys, 'stdout', None)
  terminal.flush()


def run(code: str, before: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess:
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE} | options
  return subprocess.run([*before, sys.executable, '-c', OUTLIVE + code], timeout=60, **pipes)


def test_without_a_buffer_a_line_is_there_at_once():
  environment = os.environ | {'PYTHONUNBUFFERED': '1'}
  done = run('print("é")\nos.kill(os.getpid(), signal.SIGKILL)', env=environment)
  assert (done.returncode, done.stdout.decode()) == (-signal.SIGKILL, 'é\n')


def test_all_of_a_long_text_arrives():
  done = run('print("x" * 10**6)\nprint("end", end="")')
  assert (done.returncode, len(done.stdout), done.stdout[-4:]) == (0, 10**6 + 4, b'\nend')


def test_output_may_be_closed_from_the_beginning():
  done = run('print("x")\nterminal.flush()', ('sh', '-c', 'exec "$0" "$@" >&-'))
  assert (done.returncode, done.stderr) == (0, b'')


def test_a_reader_that_takes_nothing_is_not_waited_for():
  code = 'import fcntl\nfcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)\n'
  reading, writing = os.pipe()
  done = run(code + 'print("x" * 10**6, flush=True)', stdout=writing)
  os.close(reading)
  os.close(writing)
  assert (done.returncode, done.stderr) == (0, b'')
