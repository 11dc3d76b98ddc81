"""Sends SIGTERM to runs, and looks at how they leave and go on.

python tests/benchmarks/signals.py [--signals 50] [--processes 1] [--seed 0]

At random times; of several processes to one.  All must leave with 75, in time, with the step that
was being made saved; taken up, they must end as one that was left alone.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import trials

from lmjax import record
from lmjax.check.resume import EXPERIMENT, logged


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def begin(
  root: pathlib.Path, workdir: pathlib.Path, count: int, crash: str = '', at: int = 0
) -> list[subprocess.Popen]:
  """The processes of a run, which write to <workdir>.N.log.

  The last runs the code `crash` instead, with {argv}, and {step} = `at` in it.
  """
  arguments = [sys.executable, '-W', 'ignore', '-m', 'lmjax.main', f'--config={root}/experiment.py']
  arguments += [f'--workdir={workdir}']
  if count > 1:
    arguments += [f'--coordinator=localhost:{free_port()}', f'--processes={count}']
  flags = {'XLA_FLAGS': f'--xla_force_host_platform_device_count={4 // count}'}
  running = []
  for i in range(count):
    with open(f'{workdir}.{i}.log', 'a') as log:
      own = [*arguments, *([f'--process={i}'] if count > 1 else [])]
      if crash and i == count - 1:
        own = [sys.executable, '-c', crash.format(argv=own[4:], step=at)]
      running.append(subprocess.Popen(own, stdout=log, stderr=log, env=os.environ | flags))
  return running


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--signals', type=int, default=50)
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  chance, began = random.Random(args.seed), time.monotonic()
  seconds, wrong, sent, early = [], [], 0, 0
  with tempfile.TemporaryDirectory() as scratch:
    root = pathlib.Path(scratch)
    c = trials.experiment(
      'gpt', root, **{'steps': 400, 'checkpoint.every': 50, 'evaluate.every': 100}
    )
    (root / 'config.json').write_text(json.dumps(c))
    (root / 'experiment.py').write_text(EXPERIMENT)
    codes = [p.wait() for p in begin(root, root / 'straight', args.processes)]
    assert codes == [0] * args.processes, codes
    while sent < args.signals:
      workdir = root / f'run{sent}'
      while True:
        first = logged(workdir)
        running = begin(root, workdir, args.processes)
        after = first + chance.randint(0, 120) if sent < args.signals else 10**9
        while logged(workdir) < after and running[0].poll() is None:
          time.sleep(0.002)
        time.sleep(chance.random() / 10)
        if running[0].poll() is None and sent < args.signals:
          steps, sent, at = logged(workdir), sent + 1, time.monotonic()
          chance.choice(running).send_signal(signal.SIGTERM)
          codes = [p.wait(timeout=60) for p in running]
          seconds.append(time.monotonic() - at)
          newest = max(trials.committed(workdir), default=0)
          told = pathlib.Path(f'{workdir}.0.log').read_text()
          early += 'before the first step' in told.splitlines()[-1]
          finished = (workdir / 'result.json').exists()
          if codes != [75] * args.processes and not finished:
            wrong.append([sent, codes, told[-500:]])
          if newest < steps:
            wrong.append([sent, f'{steps} steps were made, and {newest} saved'])
        codes = [p.wait(timeout=120) for p in running]
        if (workdir / 'result.json').exists():
          break
      wrong += [[sent, line] for line in record.diff(root / 'straight', workdir)]
      shutil.rmtree(workdir)
  seconds.sort()
  result = {'signals': sent, 'processes': args.processes, 'before the first step': early}
  result |= {'seconds to leave': {'median': seconds[len(seconds) // 2], 'most': seconds[-1]}}
  print(json.dumps(result | {'wrong': wrong, 'seconds': round(time.monotonic() - began)}, indent=2))
  sys.exit(bool(wrong))


if __name__ == '__main__':
  main()
