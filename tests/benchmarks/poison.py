"""Injects NaN and infinities into steps, and looks at the bits of the state.

python tests/benchmarks/poison.py [--trials 1000] [--objective gpt] [--strategy fsdp] [--seed 0]

Into the loss, one element of one leaf's gradient (of which one shard has it), or several steps in a
row.  No bad step may change a bit, and every good one must do what it does where there are no bad
ones between.
"""

import argparse
import collections
import json
import pathlib
import random
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests import conftest  # noqa: F401, first: it gives JAX eight devices

# isort: split
import jax
import numpy as np
import trials

from lmjax import experiment, fingerprint, sharding, train
from lmjax.data import loader
from tests.guard_test import infect


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--trials', type=int, default=1000)
  parser.add_argument('--objective', default='gpt', choices=trials.OBJECTIVES)
  parser.add_argument('--strategy', default='fsdp')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  chance, began = random.Random(args.seed), time.monotonic()
  counts, wrong, done = collections.Counter(), [], 0
  with tempfile.TemporaryDirectory() as scratch:
    overrides = {'sharding.strategy': args.strategy, 'guard.on_bad': 'skip'}
    c = trials.experiment(args.objective, pathlib.Path(scratch), **overrides)
    made, mesh = experiment.prepare(c), sharding.make_mesh()
    with jax.set_mesh(mesh), sharding.logical_axes(args.strategy):
      like, transform, make_state = train.init_state(made, mesh)
      data = loader.Loader(made.examples('train'), c['batch'], 0, made.rows(mesh))
      sizes = [x.size for x in jax.tree.leaves(like.params)]
      names = list(fingerprint.named(like.params))
      healthy = {'to_loss': np.float32(0), 'to_leaf': np.zeros(len(sizes), np.float32), 'place': 0}
      straight = healed = make_state()
      batches = [made.place(data.batch(i), mesh) for i in range(20)]
      infect(made)
      step = jax.jit(train.make_step(made, transform))
      i = 0
      while done < args.trials:
        kind = chance.choice(['loss', 'one leaf', 'several in a row'])
        for _ in range(chance.randint(2, 5) if kind == 'several in a row' else 1):
          bad, poison = dict(healthy), np.float32(chance.choice([np.nan, np.inf, -np.inf]))
          if kind == 'loss' or (kind != 'one leaf' and chance.random() < 0.5):
            bad['to_loss'] = poison
          else:
            leaf = chance.randrange(len(sizes))
            bad['to_leaf'] = healthy['to_leaf'].copy()
            bad['to_leaf'][leaf] = poison
            bad['place'] = chance.randrange(sizes[leaf])
          before = fingerprint.of_tree(healed)
          healed, numbers = step(healed, batches[chance.randrange(20)] | bad)
          done, counts[kind] = done + 1, counts[kind] + 1
          if numbers['guard']['taken'] or fingerprint.of_tree(healed) != before:
            wrong.append([kind, 'changed the state'])
          found = np.flatnonzero(~np.isfinite(numbers['guard']['squares'])).tolist()
          if (
            not np.isfinite(poison + bad['to_leaf']).all()
            and not bad['to_loss']
            and found != [leaf]
          ):
            wrong.append([kind, names[leaf], found])
        straight, _ = step(straight, batches[i % 20] | healthy)
        healed, _ = step(healed, batches[i % 20] | healthy)
        i += 1
        if fingerprint.of_tree(straight) != fingerprint.of_tree(healed):
          wrong.append([kind, 'the next step was another'])
          straight = healed
  result = {'objective': args.objective, 'strategy': args.strategy, 'injected': done}
  result |= {'by kind': dict(counts), 'good steps between': i, 'wrong': wrong[:20]}
  print(json.dumps(result | {'seconds': round(time.monotonic() - began)}, indent=2))
  sys.exit(bool(wrong))


if __name__ == '__main__':
  main()
