"""What safety costs: a run with all of it, beside one without.

python tests/benchmarks/safety.py [--rounds 5] [--saves 3]

With: checkpoints every 50 steps, the ledger, fingerprints, the guard, replicas compared every 100
steps.  Without: none of these; the step has no guard in it.  The time counts from the 60th step for
50 steps a save, as what the first save compiles is paid once.  Also how long a save keeps the steps
waiting, beside a bare copy of the state from the device, and how long it takes from the start of a
process to the first step of a run that is taken up.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import signals
import trials

from lmjax import guard, metrics, saving, train
from lmjax.data import loader

BIG = {'batch': 32, 'length': 128, 'model.depth': 4, 'model.dim': 128, 'model.heads': 4}


def unguarded(loss, grads, losses, count, deviations):
  squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grads)]
  return True, jnp.sqrt(sum(squares)), {'taken': True, 'spike': False, 'loss': loss, 'squares': []}


def rate(c: dict, workdir: pathlib.Path) -> tuple[float, float]:
  """(steps a second, steps a CPU second) from the 60th until 10 before the end, saves included.

  On a CPU that does all the work the second says the same, and less of what else is at work.
  """
  times, push = [], metrics.Log.push

  def timed(self, *rest):
    push(self, *rest)
    times.append((time.perf_counter(), time.process_time()))

  metrics.Log.push = timed
  train.run(c, str(workdir))
  metrics.Log.push = push
  return tuple((len(times) - 70) / (b - a) for a, b in zip(times[59], times[-11], strict=True))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--saves', type=int, default=3)
  args = parser.parse_args()
  stalls, copies, rates = [], [], {'with': [], 'without': []}
  save = saving.Saving.save

  def timed_save(self, step, state, *rest, **last):
    jax.block_until_ready(state)
    began = time.perf_counter()
    jax.device_get(jax.tree.map(lambda x: x if x.dtype != state.rng.dtype else None, state))
    between = time.perf_counter()
    copies.append(between - began)
    save(self, step, state, *rest, **last)
    if not last.get('last'):
      stalls.append(time.perf_counter() - between)

  with tempfile.TemporaryDirectory() as scratch:
    root = pathlib.Path(scratch)
    own = {
      'steps': 70 + 50 * args.saves,
      'checkpoint.every': 50,
      'evaluate.every': 10**6,
      'log.every': 10,
    }
    c = trials.experiment('gpt', root, **{**BIG, **own, 'guard.replicas': 100})
    bare = {**c, 'checkpoint': {**c['checkpoint'], 'every': 10**6}}
    bare['guard'] = {**c['guard'], 'replicas': 0}
    for i in range(args.rounds):
      for kind in ('with', 'without')[:: -1 if i % 2 else 1]:
        judge, digest = guard.judge, loader.fingerprint
        if kind == 'without':
          guard.judge, loader.fingerprint = unguarded, lambda *_: 0
        rates[kind].append(rate(c if kind == 'with' else bare, root / f'{kind}{i}'))
        guard.judge, loader.fingerprint = judge, digest
      print(
        {k: [round(x, 3) for x in v[-1]] for k, v in rates.items()}, file=sys.stderr, flush=True
      )
    saving.Saving.save = timed_save
    train.run(c, str(root / 'stalls'))
    saving.Saving.save = save
    size = sum(x.stat().st_size for x in (root / 'stalls/checkpoints').rglob('*') if x.is_file())
    every_step = {**c, 'log': {**c['log'], 'every': 1}}
    (root / 'config.json').write_text(json.dumps(every_step))
    (root / 'experiment.py').write_text(signals.EXPERIMENT)
    starts = [restart(root, i) for i in range(args.rounds)]
  pairs = list(zip(rates['with'], rates['without'], strict=True))
  by_clock, by_cpu = ([a[i] / b[i] for a, b in pairs] for i in range(2))
  result = {
    'steps a second': {k: round(statistics.median(x for x, _ in v), 3) for k, v in rates.items()},
    'with over without': [round(r, 3) for r in by_clock],
    'median': round(statistics.median(by_clock), 3),
    'by CPU seconds': [round(r, 3) for r in by_cpu],
    'median by CPU seconds': round(statistics.median(by_cpu), 3),
    'save keeps waiting, seconds': round(statistics.median(stalls), 4),
    'bare copy, seconds': round(statistics.median(copies), 4),
    'megabytes of two checkpoints': round(size / 1e6, 1),
    'restart to first step, seconds': round(statistics.median(starts), 2),
    'jax': jax.__version__,
  }
  print(json.dumps(result, indent=2))


def restart(root: pathlib.Path, number: int) -> float:
  """Seconds from the start of a process to the first line of the ledger after its checkpoint."""
  workdir = root / f'restart{number}'
  (process,) = signals.begin(root, workdir, 1)
  while not (workdir / 'checkpoints/50').exists():
    time.sleep(0.01)
  process.kill()
  process.wait()
  began = time.monotonic()
  (process,) = signals.begin(root, workdir, 1)
  log = pathlib.Path(f'{workdir}.0.log')
  while '\nstep ' not in log.read_text().partition('resuming')[2]:
    time.sleep(0.01)
  taken = time.monotonic() - began
  process.kill()
  process.wait()
  return taken


if __name__ == '__main__':
  main()
