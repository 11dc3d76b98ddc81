"""Seconds: to the help, to the sentence about a wrong config, to the first step (median of three).

python tests/benchmarks/startup.py
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

MAIN = [sys.executable, '-m', 'lmjax.main']
QUICK = [*MAIN, '--config', 'experiments/quickstart.py']


def seconds(command: list[str]) -> float:
  began = time.perf_counter()
  subprocess.run(command, capture_output=True)
  return time.perf_counter() - began


def first_step(check: bool = True) -> float:
  """From the command to the first line of the ledger, with a warm token store and programs."""
  with tempfile.TemporaryDirectory() as directory:
    began = time.perf_counter()
    flags = ['--workdir', directory, '--config.log.every=1', f'--config.check={check}']
    process = subprocess.Popen([*QUICK, *flags], stdout=subprocess.DEVNULL)
    ledger = pathlib.Path(directory) / 'ledger.jsonl'
    while not (ledger.exists() and ledger.stat().st_size):
      time.sleep(0.02)
    taken = time.perf_counter() - began
    process.kill()
    process.wait()
  return taken


def main() -> None:
  first_step()  # makes corpus, tokenizer and store
  cases = {
    'help': lambda: seconds([*MAIN, '--help']),
    'wrong config': lambda: seconds([*QUICK, '--workdir', '/tmp/x', '--config.stepz=3']),
    'first step': first_step,
    'first step, without the oracles': lambda: first_step(check=False),
  }
  print(
    json.dumps({k: round(statistics.median(f() for _ in range(3)), 2) for k, f in cases.items()})
  )


if __name__ == '__main__':
  main()
