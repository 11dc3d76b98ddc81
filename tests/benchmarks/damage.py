"""Harms the newest checkpoint of a run and looks at what is restored.

python tests/benchmarks/damage.py [--trials 1000] [--seed 0]

Every file of the step, in turn, has a bit flipped, or is cut, emptied or deleted.  Each time either
the step before must be restored, the damaged one set aside and named, or the newest, to the bit.
"""

import argparse
import collections
import contextlib
import io
import json
import pathlib
import random
import shutil
import sys
import tempfile
import time

import jax
import trials

from lmjax import experiment, fingerprint, sharding, train
from lmjax.checkpoint import Checkpoints

HARM = ('flipped', 'cut', 'emptied', 'deleted')


def harm(file: pathlib.Path, how: str, chance: random.Random) -> None:
  data = bytearray(file.read_bytes())
  if how == 'flipped' and data:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
  if how == 'cut':
    data = data[: chance.randrange(len(data) or 1)]
  if how == 'emptied':
    data = b''
  file.unlink() if how == 'deleted' else file.write_bytes(bytes(data))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--trials', type=int, default=1000)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  chance, began = random.Random(args.seed), time.monotonic()
  outcomes, wrong = collections.Counter(), []
  with tempfile.TemporaryDirectory() as scratch:
    root = pathlib.Path(scratch)
    c = trials.experiment('gpt', root, steps=10)
    train.run(c, str(root / 'run'))
    good = root / 'run' / 'checkpoints'
    mesh = sharding.make_mesh()
    like = train.init_state(experiment.prepare(c), mesh)[0]
    prints = {}
    with Checkpoints(good, read_only=True) as checkpoints:
      for step in checkpoints.steps():
        prints[step] = fingerprint.of_tree(checkpoints.restore(like, step)[1])
    older, newest = sorted(prints)
    files = sorted(p.relative_to(good) for p in (good / str(newest)).rglob('*') if p.is_file())
    for trial in range(args.trials):
      file, how = files[trial % len(files)], HARM[trial // len(files) % len(HARM)]
      place = root / 'harmed'
      shutil.copytree(good, place)
      harm(place / file, how, chance)
      with contextlib.redirect_stderr(io.StringIO()) as said, Checkpoints(place) as checkpoints:
        step, state, _ = checkpoints.restore(like)
      same = fingerprint.of_tree(state) == prints[step]
      aside = (place / 'quarantine' / str(newest)).exists()
      named = f'{place / str(newest)} is damaged' in said.getvalue()
      if step == newest and same and not aside:
        outcomes[f'{how}: bit-equal'] += 1
      elif step == older and same and aside and named:
        outcomes[f'{how}: fell back'] += 1
      else:
        wrong.append([str(file), how, step, same, aside, said.getvalue()[-300:]])
      shutil.rmtree(place)
  result = {'trials': args.trials, 'files': len(files), 'outcomes': dict(sorted(outcomes.items()))}
  result |= {'wrong': wrong, 'seconds': round(time.monotonic() - began), 'jax': jax.__version__}
  print(json.dumps(result, indent=2))
  sys.exit(bool(wrong))


if __name__ == '__main__':
  main()
