"""How many tokens should BERT predict?  15, 20, 30 or 40 % of them, at two learning rates.

python -m lmjax.ablate --config experiments/ablations/mask_rate.py --workdir DIR

Hardware: 2 CPU cores.  Time: not yet run.  Result: not yet run.
Wettig et al., 2023, find 40 % better than 15 % for large models.
"""

from lmjax import config

TOPOLOGIES = {'cpu:1': {}}


def get_config():
  c = config.base(objective='mlm')
  c.steps, c.batch, c.length = 400, 16, 128
  c.tokenizer.update(vocab_size=2048, model_type='unigram')
  c.model.update(size='bert_tiny', initializer='bert', ffn='gelu', scan=False)
  c.model.update(norm_position='post', embed_norm=True)
  c.optimizer.update(lr=1e-3, warmup_steps=40, weight_decay=0.01, clip=1.0)
  c.checkpoint.every = c.evaluate.every = 200
  c.evaluate.batches = 32
  return c


def sweep():
  rates = {'objective.rate': [0.15, 0.2, 0.3, 0.4]}
  return config.product(rates, {'optimizer.lr': [5e-4, 1e-3]})
