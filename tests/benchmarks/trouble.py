"""What a user sees, and what survives, when peers die, disks fail, or two runs want one workdir.

python tests/benchmarks/trouble.py peers|storage|writers [--tries 50] [--seed 0] [--only WORD]

--only runs the rows of `peers` with this word in their names.

The rows of `storage` mount a small disk in memory, for which one must be root.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import signals
import trials

CRASH = """import sys
from lmjax import command, metrics
push = metrics.Log.push
def crash(self, step, *rest):
  push(self, step, *rest)
  if step == {step}:
    raise RuntimeError('the peer has crashed')
metrics.Log.push = crash
import runpy
sys.argv = {argv}
runpy.run_module('lmjax.main', run_name='__main__')
"""


def logged(workdir: pathlib.Path, step: int, process: subprocess.Popen) -> None:
  """Returns when a step is logged, or the process gone."""
  while signals.logged(workdir) < step and process.poll() is None:
    time.sleep(0.002)


def reached(workdir: pathlib.Path, step: int, pid: int) -> None:
  """Returns when a step is logged, or the process gone, which is still to be waited for."""
  gone = lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
  while signals.logged(workdir) < step and not gone():
    time.sleep(0.002)


def say(log: str) -> str:
  """The last line that is ours, with what differs from try to try left out."""
  lines = [line for line in log.splitlines() if line.startswith('lmjax: ')]
  last = lines[-1] if lines else (log.strip().splitlines() or [''])[-1]
  return re.sub(r'/\S+|\(\S+\)', '…', re.sub(r'\d+', 'N', last))[:140]


# ------------------------------------------------------------------------------------------- peers


def peers(root: pathlib.Path, tries: int, chance: random.Random, only: str) -> dict:
  rows = {}
  c = trials.experiment(
    'gpt', root, **{'steps': 120, 'checkpoint.every': 20, 'evaluate.every': 120}
  )
  (root / 'config.json').write_text(json.dumps(c))
  (root / 'experiment.py').write_text(signals.EXPERIMENT)
  assert [p.wait() for p in signals.begin(root, root / 'straight', 2)] == [0, 0]
  kinds = ('worker killed', 'coordinator killed', 'worker stopped', 'worker crashes')
  for kind in (kind for kind in kinds if only in kind):
    told, seconds, wrong = collections.Counter(), [], []
    for i in range(tries):
      workdir = root / 'run'
      crash_at = chance.randint(1, 60)
      pair = signals.begin(
        root, workdir, 2, crash=CRASH if kind == 'worker crashes' else '', at=crash_at
      )
      hurt = 0 if kind == 'coordinator killed' else 1
      logged(workdir, crash_at, pair[0])
      time.sleep(chance.random() / 10)
      if kind != 'worker crashes':
        pair[hurt].send_signal(signal.SIGSTOP if kind == 'worker stopped' else signal.SIGKILL)
      began = time.monotonic()
      try:
        code = pair[1 - hurt].wait(timeout=60)
      except subprocess.TimeoutExpired:
        wrong.append([i, 'did not end'])
        pair[1 - hurt].kill()
        code = None
      seconds.append(time.monotonic() - began)
      pair[hurt].kill()
      pair[hurt].wait()
      text = pathlib.Path(f'{workdir}.{1 - hurt}.log').read_text()
      told[f'{code}: {say(text)}'] += 1
      print(kind, i, code, f'{seconds[-1]:.1f} s', file=sys.stderr, flush=True)
      if code != 75:
        wrong.append([i, code, text[-300:]])
      if i % 5 == 0:
        codes = [p.wait(timeout=600) for p in signals.begin(root, workdir, 2)]
        wrong += [[i, codes]] if codes != [0, 0] else []
        wrong += [[i, line] for line in trials.differences(root / 'straight', workdir)]
      shutil.rmtree(workdir)
      for log in root.glob('run.*.log'):
        log.unlink()
    rows[kind] = {'told': dict(told), 'seconds, most': round(max(seconds), 1), 'wrong': wrong}
    print(kind, rows[kind], file=sys.stderr, flush=True)
  return rows


# ----------------------------------------------------------------------------------------- storage


FOR_A_WHILE = 'full for a while, but for the log'


def storage(root: pathlib.Path, tries: int, chance: random.Random, _: str) -> dict:
  disk = root / 'disk'
  disk.mkdir()
  c = trials.experiment('gpt', root, **{'model.dim': 64, 'steps': 60, 'checkpoint.every': 10})
  assert trials.wait(trials.start(c, root / 'straight')) == 0
  workdir = disk / 'run'
  checkpoints = str(workdir / 'checkpoints')
  call = lambda *words: subprocess.run(words, check=True)

  def fill(spare=0):
    with open(disk / 'filler', 'wb', buffering=0) as file:
      with contextlib.suppress(OSError):
        while file.write(b'x' * 4096):
          continue
      file.truncate(file.tell() - spare)

  def read_only():  # no disk becomes so while its files are open, but a second name for it does
    call('mount', '--bind', checkpoints, checkpoints)
    while subprocess.run(
      ['mount', '-o', 'remount,bind,ro', checkpoints], stderr=subprocess.DEVNULL
    ).returncode:
      time.sleep(0.05)  # a file was open under the new name already

  harm = {
    FOR_A_WHILE: lambda: fill(spare=200_000),
    'full to the end': fill,
    'read-only from a step on': read_only,
    'directory removed': lambda: shutil.rmtree(workdir / 'checkpoints'),
  }
  rows = {}
  for kind, act in harm.items():
    told, wrong = collections.Counter(), []
    for i in range(tries):
      call('mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', str(disk))
      pid = trials.start(c, root / 'on', workdir=workdir)
      at = chance.randint(11, 40)
      reached(workdir, at, pid)
      had = trials.committed(workdir)
      act()
      if kind == FOR_A_WHILE:
        reached(workdir, at + 12, pid)
        (disk / 'filler').unlink()
      code = trials.wait(pid)
      text = (root / 'on.log').read_text()
      told[f'{code}: {say(text)}'] += 1
      if kind == 'read-only from a step on':
        call('umount', checkpoints)
      (disk / 'filler').unlink(missing_ok=True)
      expected = {FOR_A_WHILE: (0, 74), 'directory removed': (0, 74)}.get(kind, (74,))
      if code not in expected:
        wrong.append([i, code, text[-400:]])
      there = trials.committed(workdir)
      if kind != 'directory removed' and max(there, default=0) < max(had, default=0):
        wrong.append([i, f'of {had} only {there} survived'])
      if code and kind != 'directory removed':
        again = trials.wait(trials.start(c, root / 'on', workdir=workdir))
        wrong += [[i, 'again', again]] if again else []
      if kind != 'directory removed':
        wrong += [[i, line] for line in trials.differences(root / 'straight', workdir)]
      left = [p.name for p in (workdir / 'checkpoints').glob('*tmp*')] if workdir.exists() else []
      wrong += [[i, left]] if left else []
      call('umount', str(disk))
      (root / 'on.log').unlink()
    rows[kind] = {'told': dict(told), 'wrong': wrong}
    print(kind, rows[kind], file=sys.stderr, flush=True)
  return rows


# ----------------------------------------------------------------------------------------- writers


def writers(root: pathlib.Path, tries: int, chance: random.Random, _: str) -> dict:
  c = trials.experiment('gpt', root, steps=20)
  assert trials.wait(trials.start(c, root / 'straight')) == 0
  told, wrong = collections.Counter(), []
  for i in range(tries):
    workdir = root / f'run{i}'
    pids = [trials.start(c, root / f'{i}.{n}', workdir=workdir) for n in range(2)]
    codes = sorted(trials.wait(pid) for pid in pids)
    texts = [(root / f'{i}.{n}.log').read_text() for n in range(2)]
    refused = [text for text in texts if 'another run is at work' in text]
    told[f'{codes}: {say(refused[0]) if refused else "both finished, one after the other"}'] += 1
    if codes not in ([0, 2], [0, 0]) or (codes == [0, 2]) != bool(refused):
      wrong.append([i, codes, [text[-300:] for text in texts]])
    wrong += [[i, line] for line in trials.differences(root / 'straight', workdir)]
    # One that was killed holds nothing.
    (workdir / 'result.json').unlink()
    shutil.rmtree(workdir / 'checkpoints')
    (workdir / 'ledger.jsonl').unlink()
    pid = trials.start(c, root / f'{i}.3', workdir=workdir)
    time.sleep(chance.random() * 2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    again = trials.wait(trials.start(c, root / f'{i}.4', workdir=workdir))
    wrong += [[i, 'after a kill', again]] if again else []
    shutil.rmtree(workdir)
  return {'two at once, then one killed': {'told': dict(told), 'wrong': wrong}}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('table', choices=['peers', 'storage', 'writers'])
  parser.add_argument('--tries', type=int, default=50)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default='')
  args = parser.parse_args()
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as scratch:
    table = {'peers': peers, 'storage': storage, 'writers': writers}[args.table]
    rows = table(pathlib.Path(scratch), args.tries, random.Random(args.seed), args.only)
  result = {'tries of each': args.tries, 'seconds': round(time.monotonic() - began), **rows}
  print(json.dumps(result, indent=2, ensure_ascii=False))
  sys.exit(any(row['wrong'] for row in rows.values()))


if __name__ == '__main__':
  main()
