"""A run that is asked to stop saves its step, says so, and goes on as if nothing had been."""

import http.server
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from lmjax import checkpoint, evaluate, metrics, stopping, train
from lmjax.errors import Restart
from tests.processes_test import free_port, spawn
from tests.train_test import as_file, assert_same_run, lines

ASKED = {'log.every': 5, 'checkpoint.every': 4, 'evaluate.every': 6, 'steps': 12}


def after(monkeypatch, owner, name, calls, act):
  """`act` after so many calls of a method."""
  method, count = getattr(owner, name), [0]

  def called(*args, **kwargs):
    result = method(*args, **kwargs)
    count[0] += 1
    if count[0] == calls:
      act()
    return result

  monkeypatch.setattr(owner, name, called)


def signalled(number=signal.SIGTERM):
  os.kill(os.getpid(), number)
  time.sleep(0.2)  # a thread hears it


@pytest.fixture(scope='module')
def straight(tiny, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('straight')
  train.run(tiny('clm', **ASKED, **{'model.dropout': 0.1}), str(workdir))
  return workdir


@pytest.mark.parametrize(
  ('number', 'step'),
  [(signal.SIGTERM, step) for step in (1, 4, 5, 6, 12)] + [(signal.SIGINT, 9), (signal.SIGHUP, 9)],
)
def test_the_step_is_saved_and_the_run_goes_on(
  tiny, tmp_path, monkeypatch, straight, step, number, capfd
):
  c = tiny('clm', **ASKED, **{'model.dropout': 0.1})
  before = signal.getsignal(number)
  after(monkeypatch, metrics.Log, 'push', step, lambda: signalled(number))
  name = signal.Signals(number).name
  said = f'stopped by {name} after step {step} of 12, which is saved'
  with pytest.raises(Restart, match=said) as e:
    train.run(c, str(tmp_path))
  assert e.value.exit_code == 75
  assert f'{name}: stopping after this step, which will be saved' in capfd.readouterr().err
  assert (tmp_path / 'checkpoints' / str(step)).exists()
  assert not (tmp_path / 'result.json').exists()
  assert signal.getsignal(number) is before
  monkeypatch.undo()
  train.run(c, str(tmp_path))
  assert f'resuming at step {step} of 12' in capfd.readouterr().out
  assert_same_run(straight, tmp_path)


def test_what_was_held_back_and_then_written_is_not_there_twice(
  tiny, tmp_path, monkeypatch, straight
):
  """Stopped between two lines, taken up, killed after the line and before the next checkpoint."""
  c = tiny('clm', **ASKED, **{'model.dropout': 0.1})
  after(monkeypatch, metrics.Log, 'push', 7, signalled)
  with pytest.raises(Restart):
    train.run(c, str(tmp_path))
  monkeypatch.undo()
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, 'save', lambda *_: None)
    after(patch, metrics.Log, 'push', 4, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      train.run(c, str(tmp_path))
  assert [line['step'] for line in lines(tmp_path, 'ledger')] == [*range(1, 11)]
  train.run(c, str(tmp_path))
  assert_same_run(straight, tmp_path)


def test_what_another_start_has_changed_is_recorded(tiny, tmp_path, monkeypatch):
  after(monkeypatch, metrics.Log, 'push', 2, signalled)
  with pytest.raises(Restart):
    train.run(tiny('clm'), str(tmp_path))
  monkeypatch.undo()
  shutil.rmtree(tmp_path / 'tokenizer')
  train.run(tiny('clm', **{'guard.on_bad': 'skip'}), str(tmp_path))
  assert (tmp_path / 'tokenizer' / 'tokenizer.json').exists()  # without it, nothing can be read
  kept = json.loads((tmp_path / 'record.json').read_text())
  assert kept['config']['guard']['on_bad'] == 'stop'
  assert [start['changed'] for start in kept['restarts']] == [
    {'config.guard.on_bad': ['stop', 'skip']}
  ]


@pytest.mark.parametrize('answers', ['TRUE', 'FALSE TRUE', '500 TRUE', '500 FALSE TRUE'])
def test_a_notice_of_preemption_is_heard(tiny, tmp_path, monkeypatch, straight, answers, capfd):
  """As Google's metadata server gives it, asked for changes since its last answer, if any."""
  c, heard, asked = tiny('clm', **ASKED, **{'model.dropout': 0.1}), threading.Event(), []
  answers = answers.split()

  class Server(http.server.BaseHTTPRequestHandler):
    log_message = lambda *_: None

    def do_GET(self):
      answer = answers[len(asked)]
      asked.append((self.path.partition('preempted')[2], self.headers['Metadata-Flavor']))
      self.send_response(500 if answer == '500' else 200)
      self.send_header('ETag', f'tag{len(asked)}')
      self.end_headers()
      self.wfile.write(answer.encode())

  server = http.server.ThreadingHTTPServer(('localhost', 0), Server)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  ask = stopping.Stop._ask
  monkeypatch.setenv('GCE_METADATA_HOST', f'localhost:{server.server_port}')
  monkeypatch.setattr(stopping, 'jax', types.SimpleNamespace(default_backend=lambda: 'tpu'))
  monkeypatch.setattr(stopping.Stop, '_ask', lambda self, name: (ask(self, name), heard.set()))
  monkeypatch.setattr(stopping, 'RETRY', 0.1)
  after(monkeypatch, metrics.Log, 'push', 3, lambda: heard.wait(30))  # if not before
  with pytest.raises(Restart, match=r'stopped by a preemption notice after step \d+ of 12'):
    train.run(c, str(tmp_path))
  server.shutdown()
  server.server_close()
  since = lambda i: f'?wait_for_change=true&timeout_sec=60&last_etag=tag{i}'
  known = ['', *(since(i + 1) if answer != '500' else '' for i, answer in enumerate(answers))]
  assert asked == [(which, 'Google') for which in known[:-1]]
  assert 'this machine is to be taken away: stopping after this' in capfd.readouterr().err
  monkeypatch.undo()
  train.run(c, str(tmp_path))
  assert_same_run(straight, tmp_path)


@pytest.mark.parametrize('batches', [1, 3])
def test_an_evaluation_is_left_and_made_again(tiny, tmp_path, monkeypatch, straight, batches):
  """The first after step 6; the third batch of it and the first of that after step 12."""
  c = tiny('clm', **ASKED, **{'model.dropout': 0.1})
  after(monkeypatch, evaluate.Experiment, 'place', 8 + batches, signalled)
  with pytest.raises(Restart, match='after step 6 of 12'):
    train.run(c, str(tmp_path))
  assert not any('eval/valid/loss' in line for line in lines(tmp_path, 'metrics'))
  monkeypatch.undo()
  train.run(c, str(tmp_path))
  assert_same_run(straight, tmp_path)


def test_an_evaluation_made_again_is_written_once(tiny, tmp_path, monkeypatch, straight):
  """Left after step 6, made when the run is taken up, which is killed before it saves again."""
  c = tiny('clm', **ASKED, **{'model.dropout': 0.1})
  after(monkeypatch, evaluate.Experiment, 'place', 9, signalled)
  with pytest.raises(Restart, match='after step 6 of 12'):
    train.run(c, str(tmp_path))
  monkeypatch.undo()
  after(monkeypatch, metrics.Log, 'push', 1, lambda: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    train.run(c, str(tmp_path))
  assert sum('eval/valid/loss' in line for line in lines(tmp_path, 'metrics')) == 1
  monkeypatch.undo()
  train.run(c, str(tmp_path))
  assert_same_run(straight, tmp_path)


def command(tiny, tmp_path, **overrides) -> list[str]:
  c = tiny('clm', **{'steps': 4000, 'checkpoint.every': 4000, 'evaluate.every': 4000} | overrides)
  return ['-m', 'lmjax.main', as_file(c, tmp_path), '--workdir', str(tmp_path / 'run')]


@pytest.fixture
def started():
  """started(arguments) -> a process, which does not outlive the test."""
  processes = []

  def start(arguments):
    processes.append(spawn(arguments))
    return processes[-1]

  yield start
  for process in processes:
    process.kill()
    process.communicate()


def until(condition, process) -> None:
  while not condition():
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)


def test_a_signal_before_the_first_step_ends_it_at_once(tiny, tmp_path, started):
  process = started(command(tiny, tmp_path))
  until(lambda: (tmp_path / 'run').exists(), process)
  process.send_signal(signal.SIGTERM)
  began = time.monotonic()
  _, said = process.communicate(timeout=60)
  assert time.monotonic() - began < 10
  assert 'stopped by SIGTERM before the first step: nothing is lost; start it again' in said
  assert process.returncode == 75
  assert not list((tmp_path / 'run' / 'checkpoints').glob('*'))


def test_any_command_leaves_with_75(started):
  code = (
    'import time\nfrom lmjax import command\n'
    'def main():\n  print("begun", flush=True)\n  time.sleep(60)\n'
    'command.run(main, ["it"])\n'
  )
  process = started(['-c', code])
  process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=10)
  assert (process.returncode, said) == (75, 'lmjax: stopped by SIGTERM\n')


def test_ctrl_c_is_two_sentences(tiny, tmp_path, started):
  # A shell's background jobs, and all their children, ignore the signal unless told otherwise.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  process = started(command(tiny, tmp_path, steps=10**6))
  metrics_file = tmp_path / 'run' / 'metrics.jsonl'
  until(lambda: metrics_file.exists() and metrics_file.read_text(), process)
  process.send_signal(signal.SIGINT)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 75
  first, second = said.strip().splitlines()
  assert first == 'lmjax: SIGINT: stopping after this step, which will be saved'
  assert re.fullmatch(r'lmjax: stopped by SIGINT after step \d+ of 1000000, which is saved', second)


@pytest.mark.parametrize('api', [False, True])
def test_a_lost_terminal_ends_or_stops_what_ran_there(api):
  """Whose output can be written no more; the second is a script that trains."""
  waits = 'print("here", flush=True)\n  sys.stdout.write("held back")\n  time.sleep(60)\n'
  code = (
    'import sys, time\nfrom lmjax import command, stopping\n'
    + (f'def main():\n  {waits}command.run(main, ["it"])\n')
    if not api
    else 'import sys, time\nfrom lmjax import stopping\nwith stopping.Stop() as stop:\n'
    '  stop.begin()\n  print("here", flush=True)\n'
    '  while not stop.tick():\n    time.sleep(0.01)\nsys.stdout = None\n'
    'import os\nos._exit(76)\n'
  )
  ours, theirs = pty.openpty()
  process = subprocess.Popen(
    [sys.executable, '-c', code], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
  )
  os.close(theirs)
  said = b''
  while b'here' not in said or not said.endswith(b'\n'):
    said += os.read(ours, 100)
  os.close(ours)
  process.send_signal(signal.SIGHUP)
  assert process.wait(timeout=30) == (76 if api else 75)


def test_nohup_is_obeyed(tiny, tmp_path, monkeypatch):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  after(monkeypatch, metrics.Log, 'push', 3, lambda: signalled(signal.SIGHUP))
  assert train.run(tiny('clm'), str(tmp_path))['step'] == 6
  assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_the_terminal_may_go_away(tiny, tmp_path):
  """As with `| head`, or where a disk is full that the output was sent to."""
  arguments = [sys.executable, *command(tiny, tmp_path, steps=6)]
  with open('/dev/full', 'w') as full:
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=full)
    process.stdout.close()
    assert process.wait(120) == 0
  assert json.loads((tmp_path / 'run' / 'result.json').read_text())['step'] == 6


def test_a_third_signal_ends_it_at_once(started):
  """In a run that never comes to the end of its step."""
  code = (
    'import signal, sys, threading\nfrom lmjax import stopping\n'
    'with stopping.Stop() as stop:\n  stop.begin()\n  print("begun", flush=True)\n'
    '  threading.Event().wait()\n'
  )
  process = started(['-c', code])
  process.stdout.readline()
  for count in (3, 3, 1):
    for _ in range(count):  # three at once are one
      assert process.poll() is None
      process.send_signal(signal.SIGTERM)
      time.sleep(0.05)
    time.sleep(1.2)
  _, said = process.communicate(timeout=10)
  assert process.returncode == 75
  assert said.count('SIGTERM') == 2
  assert 'SIGTERM for the third time: leaving at once' in said


def test_one_of_two_is_asked_and_both_stop_after_one_step(tiny, tmp_path, started):
  port = free_port()
  arguments = [*command(tiny, tmp_path), f'--coordinator=localhost:{port}', '--processes=2']
  pair = [started([*arguments, f'--process={i}']) for i in range(2)]
  until(lambda: (tmp_path / 'run' / 'metrics.jsonl').exists(), pair[0])
  time.sleep(1)
  pair[1].send_signal(signal.SIGTERM)
  began = time.monotonic()
  said = [process.communicate(timeout=60)[1] for process in pair]
  assert time.monotonic() - began < 15
  assert [process.returncode for process in pair] == [75, 75], said
  assert 'stopped by SIGTERM after step' in said[0]
  (step,) = (int(path.name) for path in (tmp_path / 'run' / 'checkpoints').glob('*'))
  assert [f'step {step} of 4000' in text for text in said] == [True, True]


def test_a_stuck_process_is_noticed_by_the_others(tiny, tmp_path, started):
  port = free_port()
  arguments = [*command(tiny, tmp_path), f'--coordinator=localhost:{port}', '--processes=2']
  pair = [started([*arguments, f'--process={i}']) for i in range(2)]
  until(lambda: (tmp_path / 'run' / 'metrics.jsonl').exists(), pair[0])
  pair[1].send_signal(signal.SIGSTOP)
  began = time.monotonic()
  _, said = pair[0].communicate(timeout=60)
  assert time.monotonic() - began < 15
  assert pair[0].returncode == 75
  assert 'process 1 (' in said
  assert 'has not been heard of for 12 s' in said
  pair[1].send_signal(signal.SIGCONT)
  # It may be JAX that notices first that process 0 is gone, and aborts.
  assert pair[1].wait(30) in (75, -signal.SIGABRT)


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize('where', ['a callback of the garbage collector', 'a long call'])
def test_before_the_first_step_a_signal_ends_the_process(number, code, where):
  """An exception would be lost in the one, and wait for the other."""
  work = {
    'a callback of the garbage collector': (
      'gc.callbacks.append(lambda *_: (print("here", flush=True), time.sleep(2)))\n  gc.collect()\n'
      '  time.sleep(60)\n'
    ),
    'a long call': 'print("here", flush=True)\n  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)\n',
  }[where]
  code_of = (
    'import gc, hashlib, signal, time\nfrom lmjax import command\n'
    'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
    f'def main():\n  {work}command.run(main, ["it"])\n'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', code_of], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'here\n'
  process.send_signal(number)
  _, said = process.communicate(timeout=30)
  assert process.returncode == code
  assert said == {75: 'lmjax: stopped by SIGTERM\n', 130: 'lmjax: interrupted\n'}[code]


def test_no_child_outlives_a_signal(tmp_path):
  code = (
    'import time\nfrom lmjax import command\n'
    'def main():\n  with command.child(["sleep", "60"], stdout=-3, stderr=-3) as child:\n'
    '    print(child.pid, flush=True)\n    time.sleep(60)\n'
    'command.run(main, ["it"])\n'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  child = int(process.stdout.readline())
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 75
  process.communicate()
  state = pathlib.Path(f'/proc/{child}/stat')
  for _ in range(100):
    if not state.exists() or state.read_text().split()[2] == 'Z':
      return
    time.sleep(0.05)
  pytest.fail('it is still there')


def test_a_run_whose_parent_has_gone_before_it_could_look_does_not_begin(tmp_path):
  argv = [sys.executable, '-m', 'lmjax.main', '--parent=1', f'--workdir={tmp_path}/run']
  done = subprocess.run(argv, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (
    75,
    'lmjax: process 1, which has started this one, is gone\n',
  )


def test_a_child_that_saves_is_waited_for(tmp_path):
  """Who starts the same again at once must not meet it."""
  saves = 'trap "sleep 1; touch saved; exit" TERM; echo here; while :; do sleep 0.05; done'
  code = (
    'import time\nfrom lmjax import command\n'
    f'def main():\n  with command.child(["sh", "-c", {saves!r}], saves=True):\n    time.sleep(60)\n'
    'command.run(main, ["it"])\n'
  )
  argv = [sys.executable, '-c', code]
  process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
  assert process.stdout.readline() == 'here\n'
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 75
  assert (tmp_path / 'saved').exists()
  process.communicate()


def test_a_stuck_step_ends_the_process_with_all_stacks():
  code = (
    'import time\nfrom lmjax import stopping\n'
    'with stopping.Watchdog(patience=0.5) as watchdog:\n'
    '  for seconds in (2, 0.01, 0.01, 0.01, 0.3):\n    watchdog.step()\n    time.sleep(seconds)\n'
    '  watchdog.rest()\n  time.sleep(5)\n'
    '  print("no step, no watch", flush=True)\n'
    '  def stuck_here():\n    time.sleep(60)\n'
    '  watchdog.step()\n  stuck_here()\n'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=30)
  assert done.returncode == 75
  assert done.stdout == 'no step, no watch\n'
  assert 'in stuck_here' in done.stderr
  assert 'a step has taken more than 0 s: stuck' in done.stderr


def test_the_first_step_is_watched_too():
  code = (
    'import time\nfrom lmjax import stopping\n'
    'with stopping.Watchdog(patience=0.2) as watchdog:\n  watchdog.step()\n  time.sleep(60)\n'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=30)
  assert done.returncode == 75
  assert 'a step has taken more than 2 s: stuck' in done.stderr


def test_the_limit_is_ten_steps():
  watchdog = stopping.Watchdog(patience=1.0)
  assert watchdog._limit() == 10
  for seconds, limit in ((0.01, 1.0), (0.5, 2.55), (0.5, 5.0)):
    watchdog._seconds.append(seconds)
    assert watchdog._limit() == pytest.approx(limit)


def test_a_second_run_in_one_workdir_is_refused(tiny, tmp_path, started):
  arguments = command(tiny, tmp_path)
  first = started(arguments)
  metrics_file = tmp_path / 'run' / 'metrics.jsonl'
  until(lambda: metrics_file.exists() and metrics_file.read_text(), first)
  there = {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').iterdir()}
  second = started(arguments)
  _, said = second.communicate(timeout=60)
  assert second.returncode == 2
  assert f'lmjax: another run is at work in {tmp_path}/run: process {first.pid} on ' in said
  written = {'metrics.jsonl', 'ledger.jsonl', 'goodput.json', 'checkpoints'}
  now = {p: p.stat().st_mtime_ns for p in (tmp_path / 'run').iterdir() if p.name not in written}
  assert now == {path: time for path, time in there.items() if path.name not in written}
  first.kill()  # and its lock with it
  first.wait()
  third = started(arguments)
  until(lambda: str(third.pid) in (tmp_path / 'run' / '.lock').read_text(), third)
