"""BERT mini with next-sentence prediction, from its first loss to what it knows of held-out pairs.

python tests/benchmarks/nsp.py --data DIR [--steps 200]

Each text in DIR is a document, and a tenth of it is held out.  Printed are the first losses beside
ln V and ln 2, and the accuracy on held-out pairs beside that of one answer to all.
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
from lmjax.command import keep_freed_memory
from lmjax.data import loader
from lmjax.evaluate import Evaluator


def cut(data: pathlib.Path, into: pathlib.Path) -> None:
  """Writes train/ and held/ with the texts, every tenth of a hundred blocks of each held out.

  All are cut to the length of the shortest: else a second half from a short text would be suspect.
  """
  texts = {}
  for path in sorted(p for p in data.iterdir() if p.suffix in ('.txt', '.gz')):
    read = gzip.open if path.suffix == '.gz' else open
    with read(path, 'rt', encoding='utf-8') as file:
      texts[path.name] = file.read()
  size = min(map(len, texts.values())) // 100
  for name, text in texts.items():
    blocks = [text[size * i : size * (i + 1)] for i in range(100)]
    for part, is_held in (('train', False), ('held', True)):
      (into / part).mkdir(exist_ok=True)
      chosen = (block for i, block in enumerate(blocks) if (i % 10 == 9) == is_held)
      (into / part / f'{name}.txt').write_text(''.join(chosen), encoding='utf-8')


def recipe(texts: pathlib.Path, steps: int) -> config.ConfigDict:
  c = config.base(objective='mlm', tokenizer='wordpiece')
  c.steps, c.batch, c.length = steps, 32, 64
  c.data.train, c.data.eval = f'{texts}/train/*.txt', {'held': f'{texts}/held/*.txt'}
  c.tokenizer.update(vocab_size=8192, sample_megabytes=4.0)
  c.objective.update(next_sentence=True, dupe_factor=5)
  c.model.update(size='bert_mini', initializer='fan_in', ffn='gelu', scan=False)
  c.model.update(norm_position='post', embed_norm=True)
  c.optimizer.update(name='muon', lr=1e-2, warmup_steps=50, clip=1.0)
  c.optimizer.args = {'adam_learning_rate': 2e-3}
  c.evaluate.every = 100
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
  parser.add_argument('--steps', type=int, default=200)
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
  keep_freed_memory()
  main()
