"""RoBERTa (Liu et al., 2019): roberta.py:base or large, on English web text.

python -m lmjax.main --config experiments/roberta.py:base --workdir gs://BUCKET/roberta_base

Hardware: TOPOLOGIES.  Time: not yet run.  Result: not yet run.

Full sentences, no sentence pairs, new masks in every epoch, large batches.
"""

from lmjax import config

VARIANTS = ('base', 'large')
TOPOLOGIES = {  # where it is meant to run -> what it needs there
  'v5e:16x16': {'sharding.strategy': 'fsdp', 'sharding.data': 16, 'sharding.model': 16},
  'h100:8': {'sharding.strategy': 'zero', 'micro_batches': 16},
}


def get_config(size='base'):
  c = config.base(objective='mlm')
  c.steps, c.batch, c.length = 500_000, 8192, 512
  c.data.train = 'tfds:c4/en#train'
  c.data.eval = {'c4': 'tfds:c4/en#validation'}
  c.tokenizer.vocab_size = 50_265
  c.model.update(size=f'bert_{size}', dtype='bfloat16', initializer='bert', ffn='gelu')
  c.model.update(norm_position='post', embed_norm=True, dropout=0.1, attention_dropout=0.1)
  c.model.update(remat='projections', vocab_multiple=128)
  c.optimizer.lr = config.choose(size, {'base': 6e-4, 'large': 4e-4})
  c.optimizer.update(schedule='linear', weight_decay=0.01, b2=0.98, eps=1e-6)
  c.optimizer.warmup_steps = config.choose(size, {'base': 24_000, 'large': 30_000})
  c.evaluate.update(every=5000, batches=10)
  c.checkpoint.update(every=1000, keep_every=50_000)
  return c
