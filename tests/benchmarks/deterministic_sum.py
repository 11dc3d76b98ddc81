"""What deterministic_sum costs: the time of a step with it, over the time without.

python tests/benchmarks/deterministic_sum.py [--devices 2] [--rounds 5]
"""

import argparse
import json
import os
import statistics
import time

parser = argparse.ArgumentParser()
parser.add_argument('--devices', type=int, default=2)
parser.add_argument('--rounds', type=int, default=5)
args = parser.parse_args()
os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={args.devices}'

import jax  # noqa: E402

from lmjax import config, experiment, sharding, train  # noqa: E402
from lmjax.data import loader  # noqa: E402

STEPS = 10


def main() -> None:
  runs = {}
  for asked in (False, True):
    overrides = {'batch': 32, 'length': 128, 'deterministic_sum': asked, 'model.depth': 4}
    overrides |= {'model.dim': 128, 'model.heads': 4, 'steps': 1000}
    c = config.resolve(config.load('experiments/quickstart.py', overrides))
    parts = experiment.prepare(c)
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh), sharding.logical_axes('replicate'):
      like, transform, make_state = train.init_state(parts, mesh)
      step = train.lower(parts, mesh, like, transform).compile()
      data = loader.Loader(parts.examples('train'), c['batch'], 0, parts.rows(mesh))
      batch = parts.place(data.batch(0), mesh)
      runs[asked] = [step, make_state(), batch, step.memory_analysis().temp_size_in_bytes]
  seconds = {False: [], True: []}
  for _ in range(args.rounds):
    for asked, run in runs.items():
      step, state, batch, _ = run
      began = time.perf_counter()
      for _ in range(STEPS):
        state, _ = step(state, batch)
      jax.block_until_ready(state)
      seconds[asked].append((time.perf_counter() - began) / STEPS)
      run[1] = state
  ratios = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
  result = {
    'devices': args.devices,
    'step_seconds': {str(k): statistics.median(v) for k, v in seconds.items()},
    'time_ratio': statistics.median(ratios),
    'temporary_bytes': {str(k): run[3] for k, run in runs.items()},
  }
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
