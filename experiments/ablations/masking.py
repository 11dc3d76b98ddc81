"""Masks that are drawn anew in every epoch, or the same ten of each row again and again.

python -m lmjax.ablate --config experiments/ablations/masking.py --parallel 2 --workdir DIR

Hardware: 2 shared CPU cores, busy with other work.  Time: 12 minutes; a run trains for 1.6.
Result: masks that remain are worse by 0.044 ± 0.041 nats (5.495 and 5.451; 3 seeds, p = 0.043), and
ten masks of each row are not told from new ones (0.008 ± 0.138 better).  Seeds in pairs have a
third of the variance that they would have alone.

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
