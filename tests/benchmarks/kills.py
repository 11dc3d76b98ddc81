"""Kills runs with SIGKILL, takes them up, and compares with one that was left alone.

python tests/benchmarks/kills.py [--kills 300] [--objective gpt] [--seed 0] [--steps 60]

Half of the kills come at a random time; the others at a point that is most dangerous: while a run
starts, saves, commits, deletes, or writes a line.  No committed step may be lost, and every line
and the final state must be those of the run that was left alone.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time

import trials

from lmjax import checkpoint, fingerprint, jsonio, metrics, saving, train


def die() -> None:
  os.kill(os.getpid(), signal.SIGKILL)
  time.sleep(60)


def at_call(owner, name: str, number: int, after: bool = False) -> None:
  """Dies before, or after, so many calls of a function."""
  real, count = getattr(owner, name), [0]

  def call(*args, **kwargs):
    count[0] += 1
    if count[0] == number and not after:
      die()
    result = real(*args, **kwargs)
    if count[0] == number:
      die()
    return result

  setattr(owner, name, call)


def at_rename(pattern: str, number: int, after: bool) -> None:
  real, count = os.rename, [0]

  def rename(source, target, **kwargs):
    count[0] += bool(re.search(pattern, str(target)))
    due = count[0] == number and re.search(pattern, str(target))
    if due and not after:
      die()
    real(source, target, **kwargs)
    if due:
      die()

  os.rename = rename


def while_deleting(number: int, chance: random.Random) -> None:
  real, count = shutil.rmtree, [0]

  def rmtree(path, *args, **kwargs):
    if '.deleting-' in str(path):
      count[0] += 1
      if count[0] == number:
        files = [p for p in pathlib.Path(path).rglob('*') if p.is_file()]
        for file in chance.sample(files, chance.randint(0, len(files))):
          file.unlink()
        die()
    real(path, *args, **kwargs)

  shutil.rmtree = rmtree


def while_writing(number: int, seconds: float) -> None:
  """Some time after a save has begun in the background."""
  real, count = checkpoint.Checkpoints.save, [0]

  def save(self, *args, **kwargs):
    count[0] += 1
    if count[0] == number:
      threading.Timer(seconds, die).start()
    return real(self, *args, **kwargs)

  checkpoint.Checkpoints.save = save


def half_a_line(number: int) -> None:
  real, count = metrics.Log.write, [0]

  def write(self, step, values):
    count[0] += 1
    if count[0] == number:
      self._files['metrics']._file.write(json.dumps({'step': step, **values})[:20])
      self._files['metrics']._file.flush()
      die()
    real(self, step, values)

  metrics.Log.write = write


def points(chance: random.Random) -> dict:
  n = chance.randint(1, 3)
  step = r'checkpoints/\d+$'
  return {
    'start: preparing': lambda: at_call(train, 'check_best', 1),
    'start: before it is restored': lambda: at_call(saving.Saving, 'restore', 1),
    'start: when it is restored': lambda: at_call(saving.Saving, 'restore', 1, after=True),
    'start: describing': lambda: at_call(jsonio, 'write', chance.randint(1, 3)),
    'start: compiling': lambda: at_call(train, '_compile', 1),
    'start: compiled': lambda: at_call(train, '_compile', 1, after=True),
    'save: fingerprints': lambda: at_call(fingerprint, 'of', n + 1),
    'save: writing': lambda: while_writing(n, chance.random() / 20),
    'commit: before the rename': lambda: at_rename(step, n, after=False),
    'commit: after the rename': lambda: at_rename(step, n, after=True),
    'delete: before the rename': lambda: at_rename(r'\.deleting-', n, after=False),
    'delete: after the rename': lambda: at_rename(r'\.deleting-', n, after=True),
    'delete: half': lambda: while_deleting(n, chance),
    'log: half a line': lambda: half_a_line(chance.randint(1, 15)),
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--kills', type=int, default=300)
  parser.add_argument('--objective', default='gpt', choices=trials.OBJECTIVES)
  parser.add_argument('--steps', type=int, default=60)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  chance, began = random.Random(args.seed), time.monotonic()
  with tempfile.TemporaryDirectory() as scratch:
    root = pathlib.Path(scratch)
    c = trials.experiment(args.objective, root, steps=args.steps)
    assert trials.wait(trials.start(c, root / 'straight')) == 0
    began_step = time.monotonic()
    assert trials.wait(trials.start(c, root / 'timed')) == 0
    whole = time.monotonic() - began_step  # with programs kept
    counts, kills, runs, lost, wrong = collections.Counter(), 0, 0, [], []
    while kills < args.kills:
      runs += 1
      workdir, newest = root / f'run{runs}', 0
      log = workdir.with_suffix('.log')
      while True:
        kind, before, seconds = 'at random', lambda: None, chance.uniform(0.05, whole)
        if kills % 2:
          kind, before = chance.choice(list(points(chance).items()))
          seconds = 1e9
        if kills >= args.kills:
          kind, seconds, before = '', 1e9, lambda: None
        said = len(log.read_text()) if log.exists() else 0
        pid = trials.start(c, workdir, before)
        deadline, code = time.monotonic() + seconds, None
        while time.monotonic() < deadline and code is None:
          done, status = os.waitpid(pid, os.WNOHANG)
          code = os.waitstatus_to_exitcode(status) if done else None
          time.sleep(0.002)
        if code is None:
          os.kill(pid, signal.SIGKILL)
          code = trials.wait(pid)
        there = trials.committed(workdir)
        text = log.read_text()[said:]
        resumed = [int(s) for s in re.findall(r'resuming at step (\d+)', text)]
        if (resumed and resumed[0] != newest) or ('compiled' in text and newest and not resumed):
          lost.append((runs, kind, newest, resumed))
        if 'damaged' in text or 'Traceback' in text:
          wrong.append((runs, kind, text[-500:]))
        newest = max([newest, *there])
        if code == 0:
          break
        assert code == -signal.SIGKILL, (code, text[-2000:])
        kills += 1
        counts[kind] += 1
      wrong += [(runs, line) for line in trials.differences(root / 'straight', workdir)]
      shutil.rmtree(workdir)
      log.unlink()
  forced = kills - counts['at random']
  print(
    json.dumps(
      {
        'objective': args.objective,
        'kills': kills,
        'forced': forced,
        'by kind': dict(counts.most_common()),
        'runs finished': runs,
        'committed steps lost': lost,
        'differences': wrong,
        'seconds': round(time.monotonic() - began),
      },
      indent=2,
    )
  )
  sys.exit(bool(lost or wrong))


if __name__ == '__main__':
  main()
