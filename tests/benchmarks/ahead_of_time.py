"""The ahead-of-time table: train steps compiled for TPUs that are not here, beside targets.

python tests/benchmarks/ahead_of_time.py [--only 'gpt2.py:small' …] [--shipped] [--cache DIR]

With --shipped instead every experiment, as it is, on all of its TOPOLOGIES. A line of JSON for each
program; compiling takes one to five minutes of two cores each, and what is compiled is kept. A
target is what a plain JAX program written for it reaches, or the best of other code bases compiled
for the same work: dot FLOPs over 6 x matmul parameters x tokens, GiB of arguments and temporaries,
GiB of memory traffic, GiB sent by a chip.
"""

import argparse
import json
import pathlib
import runpy
from collections.abc import Iterator

from lmjax import config, hardware, plan

NO_DROPOUT = {'model.dropout': 0.0, 'model.attention_dropout': 0.0}  # as those it is compared with
GRID = {'sharding.data': 4, 'sharding.model': 4}
LEAN, LIGHT = {'model.remat': 'full'}, {'model.remat': 'projections'}
SMALL, XL, LARGE = 'gpt2.py:small', 'gpt2.py:xl', 'bert.py:large'
# (experiment, topology, overrides) -> targets: (dot / dense, memory, traffic, sent)
ROWS = [
  (SMALL, 'v5e:4x4', LEAN, (1.16, 2.7, 105, 0.66)),
  (SMALL, 'v5e:4x4', LIGHT, (1.02, 7.3, None, 0.66)),
  (XL, 'v5e:4x4', {}, (1.22, 10.7, 654, 9.0)),
  (LARGE, 'v5e:4x4', NO_DROPOUT | LEAN, (1.33, 1.95, 50, 1.93)),
  (LARGE, 'v5e:4x4', NO_DROPOUT | LIGHT, (1.14, 5.7, None, 1.93)),
  ('bert.py:base', 'v5e:4x4', NO_DROPOUT | LEAN, None),
  ('gpt_1b.py', 'v5e:4x4', {}, None),
  ('gpt_7b.py', 'v5e:16x16', {}, None),
  (SMALL, 'v6e:4x4', GRID | LEAN, None),
  (SMALL, 'v5p:2x2x4', LEAN, None),
  (SMALL, 'v5e:16x16', LEAN | {'sharding.data': 16, 'sharding.model': 16}, None),
  (SMALL, 'v5e:4x4@2', GRID | LEAN, None),
]


def measured(entry: plan.Entry, dense_tflop: float) -> tuple[float, ...]:
  memory = entry['memory_gib']
  return (
    entry['dot_tflop'] / dense_tflop,
    memory['arguments'] + memory['temporaries'],
    entry['hbm_gib'],
    sum(entry['wire_gib'].values()),
  )


def shipped() -> Iterator[tuple[str, str, config.Overrides, None]]:
  """Every variant of every experiment, wherever it is meant to run."""
  for path in sorted(pathlib.Path('experiments').glob('*.py')):
    for variant in runpy.run_path(str(path)).get('VARIANTS', ('',)):
      for topology in config.declared(str(path), 'TOPOLOGIES', {}):
        yield f'{path.name}:{variant}'.rstrip(':'), topology, {}, None


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', nargs='*', default=[])
  parser.add_argument('--shipped', action='store_true')
  parser.add_argument('--cache', default='~/.cache/lmjax')
  flags = parser.parse_args()
  rows = list(shipped()) if flags.shipped else ROWS
  hardware.prepare([topology for _, topology, _, _ in rows])
  for spec, topology, overrides, targets in rows:
    if flags.only and spec not in flags.only:
      continue
    path = f'experiments/{spec}'
    meant = config.declared(path, 'TOPOLOGIES', {}).get(topology, {})
    job = plan.Job(path, meant | overrides | {'cache': flags.cache}, topology)
    entry = plan.plan(job)
    if entry['fits']:
      parts, mesh = plan.made(job)
      found = measured(entry, parts.flops.dense / mesh.size / 1e12)
      names = ('dot_over_dense', 'memory_gib', 'hbm_gib', 'wire_gib')
      entry['beside_targets'] = {
        name: {'found': round(value, 4), 'target': target}
        for name, value, target in zip(names, found, targets or (None,) * 4, strict=True)
      }
    print(json.dumps(entry), flush=True)


if __name__ == '__main__':
  main()
