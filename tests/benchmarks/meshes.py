"""Saves a run on one layout of devices and takes it up on another, for every pair of layouts.

python tests/benchmarks/meshes.py [--objective gpt]

The batches must be those of a run on one device, and the losses too, within 1e-5.
"""

import argparse
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
import jax
import signals
import trials

from lmjax import metrics, record, sharding, train

STEPS, AT, LIMIT = 8, 4, 1e-5
# name -> (devices, what is given for the section `sharding`)
LAYOUTS = {
  '1': (1, {}),
  '2': (2, {}),
  '4 zero': (4, {'strategy': 'zero'}),
  '8 fsdp': (8, {'strategy': 'fsdp'}),
  '4x2 tensor': (8, {'strategy': 'tensor', 'data': 4, 'model': 2}),
  '2x4 fsdp+tensor': (8, {'strategy': 'fsdp+tensor', 'data': 4, 'model': 2}),
  '2x2 sequence': (4, {'strategy': 'sequence', 'data': 2, 'sequence': 2}),
}
PROCESSES = '2 processes x 2'


class Killed(BaseException):
  pass


def run(c: dict, workdir: pathlib.Path, layout: str, kill_at: int = 0) -> None:
  count, given = LAYOUTS[layout]
  c = {**c, 'sharding': {**c['sharding'], 'max_unsharded': 1.0, **given}}
  make, push = sharding.make_mesh, metrics.Log.push

  def killed(self, step, *rest):
    push(self, step, *rest)
    if step == kill_at:
      raise Killed

  sharding.make_mesh = lambda sizes=None, devices=None: make(sizes, jax.devices()[:count])
  metrics.Log.push = killed if kill_at else push
  try:
    train.run(c, str(workdir))
  except Killed:
    pass
  finally:
    sharding.make_mesh, metrics.Log.push = make, push


def in_processes(root: pathlib.Path, workdir: pathlib.Path, kill_at: int = 0) -> None:
  running = signals.begin(root, workdir, 2)
  while kill_at and not (workdir / 'checkpoints' / str(AT)).exists():
    assert running[0].poll() is None, pathlib.Path(f'{workdir}.0.log').read_text()
    time.sleep(0.002)
  for process in running:
    if kill_at:
      process.kill()
    code = process.wait(timeout=300)
    assert kill_at or code == 0, pathlib.Path(f'{workdir}.0.log').read_text()


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--objective', default='gpt', choices=trials.OBJECTIVES)
  args = parser.parse_args()
  began, worst, wrong, pairs = time.monotonic(), 0.0, [], 0
  with tempfile.TemporaryDirectory() as scratch:
    root = pathlib.Path(scratch)
    given = {'steps': STEPS, 'checkpoint.every': AT, 'evaluate.every': STEPS, 'model.dropout': 0.0}
    c = trials.experiment(args.objective, root, **given, **{'model.vocab_multiple': 8})
    whole = {**c, 'sharding': {**c['sharding'], 'max_unsharded': 1.0}}
    (root / 'config.json').write_text(json.dumps(whole))
    (root / 'experiment.py').write_text(signals.EXPERIMENT)
    run(c, root / 'straight', '1')

    def seen(workdir):
      rows = record.lines(workdir, 'metrics.jsonl')
      losses = [line['train/loss'] for line in rows if 'train/loss' in line]
      return [line['hash'] for line in record.lines(workdir, 'ledger.jsonl')], losses

    batches, losses = seen(root / 'straight')
    for first in (*LAYOUTS, PROCESSES):
      saved = root / 'saved'
      in_processes(root, saved, AT) if first == PROCESSES else run(c, saved, first, AT + 2)
      for second in (*LAYOUTS, PROCESSES):
        moved = root / 'moved'
        shutil.copytree(saved, moved)
        in_processes(root, moved) if second == PROCESSES else run(c, moved, second)
        found, values = seen(moved)
        far = max(abs(a - b) / abs(a) for a, b in zip(losses, values, strict=True))
        worst, pairs = max(worst, far), pairs + 1
        if found != batches or far > LIMIT:
          wrong.append([first, second, found == batches, far])
        shutil.rmtree(moved)
      shutil.rmtree(saved)
  result = {'objective': args.objective, 'pairs': pairs, 'largest relative difference': worst}
  print(json.dumps(result | {'wrong': wrong, 'seconds': round(time.monotonic() - began)}, indent=2))
  sys.exit(bool(wrong))


if __name__ == '__main__':
  main()
