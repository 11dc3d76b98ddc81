"""Injects NaN and infinities into steps, and looks at the bits of the state.

python tests/benchmarks/poison.py [--trials 1000] [--objective gpt] [--strategy fsdp] [--seed 0]

Into the loss, one element of one leaf's gradient (of which one shard has it), or several steps in a
row.  No bad step may change a bit, and every good one must do what it does where there are no bad
ones between.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import sys
import tempfile
import time
import types

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
import jax
import jax.numpy as jnp
import numpy as np
import trials

from lmjax import experiment, fingerprint, metrics, sharding, train
from lmjax.data import loader


@jax.custom_vjp
def poisoned(x, where, poison):
  """x, whose gradient has `poison` added in one place."""
  return x


poisoned.defvjp(
  lambda x, where, poison: (x, (where, poison)),
  lambda kept, g: (jnp.ravel(g).at[kept[0]].add(kept[1]).reshape(g.shape), None, None),
)


def infect(made: experiment.Experiment) -> None:
  """The batch says what is added to the loss and to the gradients."""
  model = made.model

  def apply(variables, batch, train, rngs=None):
    batch = dict(batch)
    to_loss, to_leaf, place = (batch.pop(key) for key in ('to_loss', 'to_leaf', 'place'))
    leaves, tree = jax.tree.flatten(variables['params'])
    leaves = [poisoned(x, place, to_leaf[i]) for i, x in enumerate(leaves)]
    terms, numbers = model.apply({'params': tree.unflatten(leaves)}, batch, train=train, rngs=rngs)
    return {
      k: metrics.Mean(m.total + to_loss * m.weight, m.weight) for k, m in terms.items()
    }, numbers

  vars(made)['model'] = types.SimpleNamespace(apply=apply)


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
