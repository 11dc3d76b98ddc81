"""BERT mini with next-sentence prediction, from its first loss to what it knows of held-out pairs.

python tests/benchmarks/nsp.py --data DIR [--steps 400]

Every text in DIR is cut: the first nine tenths are trained on, the rest is held out.  Printed are
the losses before the first step beside ln V and ln 2, and the held-out NSP accuracy beside what one
answer to all pairs would reach.
"""

import argparse
import gzip
import json
import math
import pathlib
import tempfile
import time

import jax
import numpy as np

from lmjax import config, experiment, sharding, train
from lmjax.data import loader
from lmjax.evaluate import Evaluator


def cut(data: pathlib.Path, into: pathlib.Path) -> None:
  """Writes train/ and held/ with the beginnings and the ends of all texts."""
  for path in sorted(p for p in data.iterdir() if p.suffix in ('.txt', '.gz')):
    read = gzip.open if path.suffix == '.gz' else open
    with read(path, 'rt', encoding='utf-8') as file:
      text = file.read()
    at = text.index('\n', len(text) * 9 // 10)
    for name, part in (('train', text[:at]), ('held', text[at:])):
      (into / name).mkdir(exist_ok=True)
      (into / name / f'{path.name}.txt').write_text(part, encoding='utf-8')


def recipe(texts: pathlib.Path, steps: int) -> config.ConfigDict:
  c = config.base(objective='mlm', tokenizer='wordpiece')
  c.steps, c.batch, c.length = steps, 32, 128
  c.data.train, c.data.eval = f'{texts}/train/*.txt', {'held': f'{texts}/held/*.txt'}
  c.tokenizer.update(vocab_size=8192, sample_megabytes=4.0)
  c.objective.update(next_sentence=True)
  c.model.update(size='bert_mini', initializer='bert', ffn='gelu', scan=False)
  c.model.update(norm_position='post', embed_norm=True)
  c.optimizer.update(name='muon', lr=1e-2, warmup_steps=50, clip=1.0)
  c.optimizer.args = {'adam_learning_rate': 2e-3}
  c.evaluate.update(every=100, batches=40)
  c.checkpoint.every, c.log.every = steps, 20
  return c


def first_losses(c: config.ConfigDict) -> dict[str, float]:
  parts = experiment.prepare(config.resolve(c))
  mesh, strategy = sharding.make_mesh(), c.sharding.strategy
  with jax.set_mesh(mesh), sharding.logical_axes(strategy):
    state = train.init_state(parts, mesh)[2]()
    values = Evaluator(parts, mesh)(state.params)
  batches = loader.eval_batches(parts.examples('held'), c.batch, c.evaluate.batches)
  # Rows that fill the last batch up weigh nothing.
  real, follows = zip(*((b['pair_weights'], 1 - b['pair_targets']) for b in batches), strict=True)
  share = np.average(np.concatenate(follows), weights=np.concatenate(real))
  return {
    'mlm / ln V': values['eval/held/mlm'] / math.log(parts.tokenizer.vocab_size),
    'nsp / ln 2': values['eval/held/nsp'] / math.log(2),
    'accuracy of one answer to all': float(max(share, 1 - share)),
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--data', required=True, type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=400)
  a = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    cut(a.data, pathlib.Path(scratch))
    c = recipe(pathlib.Path(scratch), a.steps)
    result = first_losses(c)
    print(json.dumps(result, indent=2), flush=True)
    began = time.process_time()
    values = train.run(c, f'{scratch}/run')['metrics']
    result |= {k: values[f'eval/held/{k}'] for k in ('mlm', 'nsp', 'mlm_accuracy', 'nsp_accuracy')}
    result['CPU minutes, of both cores together'] = (time.process_time() - began) / 60
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
