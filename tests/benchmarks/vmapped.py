"""What training seeds together gains: the time of a step of each alone, over that of all in one.

python tests/benchmarks/vmapped.py [--seeds 5] [--rounds 5] [--config FILE.py[:ARG] KEY=VALUE …]

Interleaved, on one device, without data and evaluation; without KEY=VALUE the quick start in four
sizes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lmjax import command, config, experiment, sharding, train
from lmjax.data import loader

STEPS = 10
SMALL = {'optimizer.name': 'adamw', 'optimizer.args': {}, 'steps': 1000}
SIZES = [
  {'model.depth': 1, 'model.dim': 16, 'model.heads': 2, 'batch': 2, 'length': 16},
  {'model.depth': 2, 'model.dim': 64, 'model.heads': 4, 'batch': 4, 'length': 32},
  {'model.depth': 2, 'model.dim': 64, 'model.heads': 4, 'batch': 16, 'length': 64},
  {'model.depth': 4, 'model.dim': 192, 'model.heads': 4, 'batch': 16, 'length': 128},
]


def steps(spec: str, overrides: dict, seeds: int) -> tuple[Callable, Callable]:
  """(STEPS steps of one seed, STEPS steps of all together), each ready to be timed."""
  parts = experiment.prepare(config.resolve(config.load(spec, overrides)))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh), sharding.logical_axes('replicate'):
    _, transform, make_state = train.init_state(parts, mesh)
    step = train.make_step(parts, transform)
    made = loader.Loader(parts.examples('train'), parts.config['batch'], 0).batch(0)
    batch = jax.device_put(made, jax.devices()[0])
    stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * seeds), tree)
    states = [make_state(), stack(make_state())]
    batches = [batch, stack(batch)]
    programs = [
      jax.jit(f, donate_argnums=0).lower(*given).compile()
      for f, given in zip((step, jax.vmap(step)), zip(states, batches, strict=True), strict=True)
    ]

  def timed(which: int) -> float:
    began = time.perf_counter()
    for _ in range(STEPS):
      states[which], _ = programs[which](states[which], batches[which])
    jax.block_until_ready(states[which])
    return (time.perf_counter() - began) / STEPS

  return lambda: timed(0), lambda: timed(1)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--config', default='experiments/quickstart.py')
  parser.add_argument('overrides', nargs='*')
  args = parser.parse_args()
  given = dict(one.split('=', 1) for one in args.overrides)
  for size in [given] if given else [SMALL | size for size in SIZES]:
    alone, together = steps(args.config, size, args.seeds)
    pairs = [(alone(), together()) for _ in range(args.rounds + 1)][1:]
    result = {'seeds': args.seeds, **{k: v for k, v in size.items() if k not in SMALL}}
    result |= {'ms_alone': statistics.median(a for a, _ in pairs) * 1e3}
    result |= {'ms_together': statistics.median(b for _, b in pairs) * 1e3}
    result['gain'] = statistics.median(args.seeds * a / b for a, b in pairs)
    print(json.dumps(result), flush=True)


if __name__ == '__main__':
  command.keep_freed_memory()
  main()
