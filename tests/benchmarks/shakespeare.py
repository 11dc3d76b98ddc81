"""Beside nanoGPT on the characters of Shakespeare: losses and wall seconds on one machine.

python tests/benchmarks/shakespeare.py --nanogpt DIR --torch PYTHON --data input.txt [--rounds 3]

nanoGPT runs its published CPU command with PYTHON, which has torch; then come our two recipes.
The order is the same in every round, and the medians are printed.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

PUBLISHED = (
  'train.py config/train_shakespeare_char.py --device=cpu --eval_iters=20 --log_interval=100 '
  '--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 '
  '--lr_decay_iters=2000 --dropout=0.0'
).split()


def nanogpt(python: str, checkout: str, compile_: bool) -> tuple[float, float]:
  with tempfile.TemporaryDirectory() as out:
    began = time.perf_counter()
    flags = [f'--compile={compile_}', f'--out_dir={out}']
    got = subprocess.run([python, *PUBLISHED, *flags], cwd=checkout, capture_output=True, text=True)
    seconds = time.perf_counter() - began
  losses = re.findall(r'val loss ([\d.]+)', got.stdout)
  assert losses, got.stderr
  return float(losses[-1]), seconds


def lmjax(variant: str, data: str) -> tuple[float, float]:
  with tempfile.TemporaryDirectory() as workdir:
    began = time.perf_counter()
    flags = [
      f'--config=experiments/shakespeare_char.py:{variant}',
      f'--workdir={workdir}',
      f'--config.data.train={data}#[:90%]',
      f'--config.data.eval.validation={data}#[90%:]',
    ]
    subprocess.run([sys.executable, '-m', 'lmjax.main', *flags], check=True, capture_output=True)
    seconds = time.perf_counter() - began
    result = json.loads((pathlib.Path(workdir) / 'result.json').read_text())
  return result['metrics']['eval/validation/xent'], seconds


def main() -> None:
  parser = argparse.ArgumentParser()
  for name in ('nanogpt', 'torch', 'data'):
    parser.add_argument(f'--{name}', required=True)
  parser.add_argument('--rounds', type=int, default=3)
  a = parser.parse_args()
  data = os.path.abspath(a.data)
  prepared = pathlib.Path(a.nanogpt, 'data/shakespeare_char')
  if not (prepared / 'train.bin').exists():
    (prepared / 'input.txt').write_bytes(pathlib.Path(data).read_bytes())
    subprocess.run([a.torch, 'prepare.py'], cwd=prepared, check=True, capture_output=True)
  cases = {
    'nanoGPT': lambda: nanogpt(a.torch, a.nanogpt, False),
    'nanoGPT compiled': lambda: nanogpt(a.torch, a.nanogpt, True),
    'lmjax cpu': lambda: lmjax('cpu', data),
    'lmjax cpu_best': lambda: lmjax('cpu_best', data),
  }
  runs = {name: [] for name in cases}
  for _ in range(a.rounds):
    for name, case in cases.items():
      runs[name].append(case())
      print(name, *runs[name][-1], file=sys.stderr, flush=True)
  medians = {
    name: dict(
      zip(('loss', 'seconds'), map(statistics.median, zip(*got, strict=True)), strict=True)
    )
    for name, got in runs.items()
  }
  print(json.dumps(medians, indent=2))


if __name__ == '__main__':
  main()
