"""Masks that are drawn anew in every epoch, or the same ten of each row again and again.

python -m lmjax.ablate --config experiments/ablations/masking.py --workdir DIR

Hardware: 2 CPU cores.  Time: not yet run.  Result: not yet run.
Liu et al., 2019, find dynamic masks as good or slightly better.  It takes several epochs to matter:
three of the smaller part of the corpus, and the beginning of the larger one is what is asked.
"""

from lmjax import config

TOPOLOGIES = {'cpu:1': {}}


def get_config():
  c = config.base(objective='mlm')
  c.data.train, c.data.eval = 'python#validation', {'validation': 'python'}
  c.steps, c.batch, c.length = 400, 16, 128
  c.tokenizer.update(vocab_size=2048, model_type='unigram')
  c.model.update(size='bert_tiny', initializer='bert', ffn='gelu', scan=False)
  c.model.update(norm_position='post', embed_norm=True)
  c.optimizer.update(lr=1e-3, warmup_steps=40, weight_decay=0.01, clip=1.0)
  c.checkpoint.every = c.evaluate.every = 200
  c.evaluate.batches = 32
  return c


def sweep():
  static = {'objective.dynamic': [False], 'objective.dupe_factor': [1, 10]}
  return config.chain({'objective.dynamic': [True]}, static)
