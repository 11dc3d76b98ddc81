"""The same curve everywhere: strategies x devices x micro-batches x scan x remat, and processes.

python tests/benchmarks/invariance.py [--jobs 2]

Five-step losses of a small GPT and BERT in float32, each beside those of one device, one
micro-batch, scanned layers and no recomputation.  Printed are the largest relative difference for
each strategy and place, and the whole table's; above 1e-5 the exit code is 1.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests import conftest  # first: it gives JAX eight devices

# isort: split
import jax
import numpy as np

from lmjax import config, experiment, processes, sharding
from tests.invariance_test import OBJECTIVES, curve

SIZES = {'model.heads': 4, 'model.dim': 32, 'model.depth': 2, 'model.vocab_multiple': 8}
STEPS, BOUND = 5, 1e-5
MESHES = {  # strategy -> number of devices -> their mesh
  'replicate': {1: {}, 2: {'data': 2}, 8: {'replica': 2, 'data': 4}},
  'zero': {1: {}, 2: {'data': 2}, 8: {'data': 8}},
  'fsdp': {1: {}, 2: {'data': 2}, 8: {'replica': 2, 'data': 2, 'model': 2}},
  'tensor': {1: {}, 2: {'model': 2}, 8: {'data': 2, 'model': 4}},
  'fsdp+tensor': {1: {}, 2: {'model': 2}, 8: {'replica': 2, 'data': 2, 'model': 2}},
  'sequence': {1: {}, 2: {'sequence': 2}, 8: {'data': 2, 'sequence': 4}},
}
ROWS = list(
  itertools.product(OBJECTIVES, MESHES, (1, 2, 8), (1, 4), (True, False), ('none', 'full', 'dots'))
)
PAIRS = list(itertools.product(OBJECTIVES, MESHES))
FIRST = ('replicate', 1, 1, True, 'none')


def losses(cache: str, objective, strategy, devices, micro_batches, scan, remat) -> list:
  """[steps][terms] of one row of the table."""
  name, own = OBJECTIVES[objective]
  c = config.base(objective=name, tokenizer='bytes')
  c.steps, c.batch, c.length, c.cache, c.micro_batches = STEPS, 32, 48, cache, micro_batches
  c.data.update(train=f'{cache}/train.txt', document='line')
  c.data.eval = {'valid': f'{cache}/train.txt'}
  c.sharding.update({axis: MESHES[strategy][devices].get(axis, 1) for axis in sharding.MESH_AXES})
  c.sharding.update(strategy=strategy, max_unsharded=1.0)
  c.optimizer.update(lr=1e-2, warmup_steps=2)
  with c.unlocked():
    c.update_from_flattened_dict({**own, **SIZES, 'model.scan': scan, 'model.remat': remat})
  parts = experiment.prepare(config.resolve(c))
  jax.clear_caches()  # hundreds of programs would stay in memory
  return curve(parts, range(devices), STEPS)[:, :-1].tolist()


def child(cache: str, jobs: list, start: tuple | None) -> None:
  """Prints a JSON line for each row: of its own, or as one of two processes."""
  if start:
    os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=4'
    processes.start(*start, {})
  for job in jobs:
    got = losses(cache, *job)
    if processes.index() == 0:
      print(json.dumps([job, got]), flush=True)
  if start:
    processes.finish()


def run(cache: str, parts: list[list], starts: list) -> list:
  """[job, losses] of every job, each part in a process of its own."""
  command = [sys.executable, '-W', 'ignore', __file__, '--child']
  workers, found = [], []
  for i, (jobs, start) in enumerate(zip(parts, starts, strict=True)):
    out = pathlib.Path(cache, f'{i}.out')
    arguments = json.dumps([cache, jobs, start])
    workers.append((out, subprocess.Popen([*command, arguments], stdout=out.open('w'))))
  for out, worker in workers:
    assert worker.wait() == 0
    # What else there is, gloo says.
    found += [json.loads(line) for line in out.read_text().splitlines() if line.startswith('[[')]
  return found


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--jobs', type=int, default=2)
  parser.add_argument('--child', type=json.loads, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.child:
    child(*flags.child)
    return 0
  with tempfile.TemporaryDirectory() as cache:
    pathlib.Path(cache, 'train.txt').write_text('\n'.join(conftest.documents(60)), encoding='utf-8')
    expected = {name: np.array(losses(cache, name, *FIRST)) for name in OBJECTIVES}
    found = run(cache, [ROWS[i :: flags.jobs] for i in range(flags.jobs)], [None] * flags.jobs)
    with socket.create_server(('', 0)) as server:
      port = server.getsockname()[1]
    jobs = [(*pair, 8, 1, True, 'none') for pair in PAIRS]
    pair = run(cache, [jobs] * 2, [(f'localhost:{port}', 2, i) for i in range(2)])
  assert (len(found), len(pair)) == (len(ROWS), len(PAIRS))
  worst = collections.defaultdict(float)
  for rows, where in ((found, '{} devices'), (pair, '2 processes x 4 devices')):
    for (name, strategy, devices, *_), got in rows:
      gap = float(np.max(np.abs(np.array(got) / expected[name] - 1)))
      key = f'{name}, {strategy}, {where.format(devices)}'
      worst[key] = max(worst[key], gap)
  rows, largest = len(found) + len(pair), max(worst.values())
  print(json.dumps({'rows': rows, 'bound': BOUND, 'worst': largest, 'by_place': worst}, indent=2))
  return int(largest > BOUND)


if __name__ == '__main__':
  sys.exit(main())
