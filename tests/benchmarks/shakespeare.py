"""Beside nanoGPT on the characters of Shakespeare: losses and wall seconds on one machine.

python tests/benchmarks/shakespeare.py --nanogpt DIR --torch PYTHON --data input.txt \
  [--rounds 3] [--only CASE …]

nanoGPT runs its published CPU command with PYTHON, which has torch; then come our recipes, and
`cpu` with GPT-2's initial values, which is nanoGPT's to the last number.  Every round has another
seed and the same order.  Losses are of the whole validation text in windows of 64; nanoGPT's own
estimate, from 20 random batches, is printed beside.  Of every number there is the median, and of
losses the mean and the standard deviation over the seeds.
"""

import argparse
import functools
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

# Run by PYTHON in nanoGPT's directory: its program, whose seed is no option of it.
TRAIN = """
import runpy, sys, torch
own, more = torch.manual_seed, int(sys.argv[1])
torch.manual_seed = lambda seed: own(seed + more)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
# And the loss of a checkpoint on all of the validation text.
EVALUATE = """
import sys, numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load(sys.argv[1] + '/ckpt.pt', weights_only=False)
model = GPT(GPTConfig(**saved['model_args'])).eval()
model.load_state_dict({k.removeprefix('_orig_mod.'): v for k, v in saved['model'].items()})
tokens = np.fromfile('data/shakespeare_char/val.bin', np.uint16).astype(np.int64)
rows = (len(tokens) - 1) // 64
x, y = (torch.tensor(tokens[i : i + rows * 64].reshape(rows, 64)) for i in (0, 1))
with torch.no_grad():
  losses = [model(x[i : i + 1], y[i : i + 1])[1].item() for i in range(rows)]
print('whole', np.mean(losses))
"""


def nanogpt(python: str, checkout: str, compile_: bool, seed: int) -> dict[str, float]:
  with tempfile.TemporaryDirectory() as out:
    began = time.perf_counter()
    flags = [f'--compile={compile_}', f'--out_dir={out}']
    run = functools.partial(subprocess.run, cwd=checkout, capture_output=True, text=True)
    got = run([python, '-c', TRAIN, str(seed), *PUBLISHED, *flags])
    seconds = time.perf_counter() - began
    estimates = re.findall(r'val loss ([\d.]+)', got.stdout)
    assert estimates, got.stderr
    whole = run([python, '-c', EVALUATE, out], check=True).stdout.split()[-1]
  return {'loss': float(whole), 'estimate': float(estimates[-1]), 'seconds': seconds}


def lmjax(variant: str, data: str, seed: int, *more: str) -> dict[str, float]:
  with tempfile.TemporaryDirectory() as workdir:
    began = time.perf_counter()
    flags = [
      f'--config=experiments/shakespeare_char.py:{variant}',
      f'--workdir={workdir}',
      f'--config.data.train={data}#[:90%]',
      f'--config.data.eval.validation={data}#[90%:]',
      '--config.check=False',
      f'--config.seed={seed}',
      *more,
    ]
    subprocess.run([sys.executable, '-m', 'lmjax.main', *flags], check=True, capture_output=True)
    seconds = time.perf_counter() - began
    result = json.loads((pathlib.Path(workdir) / 'result.json').read_text())
  return {'loss': result['metrics']['eval/validation/xent'], 'seconds': seconds}


def main() -> None:
  parser = argparse.ArgumentParser()
  for name in ('nanogpt', 'torch', 'data'):
    parser.add_argument(f'--{name}', required=True)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--only', nargs='+', default=[])
  a = parser.parse_args()
  data = os.path.abspath(a.data)
  prepared = pathlib.Path(a.nanogpt, 'data/shakespeare_char')
  if not (prepared / 'train.bin').exists():
    (prepared / 'input.txt').write_bytes(pathlib.Path(data).read_bytes())
    subprocess.run([a.torch, 'prepare.py'], cwd=prepared, check=True, capture_output=True)
  cases = {
    'nanoGPT': lambda seed: nanogpt(a.torch, a.nanogpt, False, seed),
    'nanoGPT compiled': lambda seed: nanogpt(a.torch, a.nanogpt, True, seed),
    'as nanoGPT': lambda seed: lmjax('cpu', data, seed, '--config.model.initializer=gpt2'),
    'cpu': lambda seed: lmjax('cpu', data, seed),
    'cpu_best': lambda seed: lmjax('cpu_best', data, seed),
  }
  runs = {name: [] for name in cases if name in a.only or not a.only}
  for seed in range(a.rounds):
    for name in runs:
      runs[name].append(cases[name](seed))
      print(name, json.dumps(runs[name][-1]), file=sys.stderr, flush=True)
  medians = lambda got: {key: statistics.median(run[key] for run in got) for key in got[0]}
  said = {name: medians(got) for name, got in runs.items()}
  for name, got in runs.items():
    losses = [run['loss'] for run in got]
    said[name]['mean loss'] = statistics.fmean(losses)
    said[name]['deviation'] = statistics.stdev(losses) if len(losses) > 1 else None
  print(json.dumps(said, indent=2))


if __name__ == '__main__':
  main()
