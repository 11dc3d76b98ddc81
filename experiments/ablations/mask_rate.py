"""How many tokens should BERT predict?  15, 20, 30 or 40 % of them, at two learning rates.

python -m lmjax.ablate --config experiments/ablations/mask_rate.py --parallel 2 --workdir DIR

Hardware: 2 shared CPU cores, busy with other work.  Time: 33 minutes; a run trains for 1.8.
Result: of the 15 % that all are asked for, one knows the more the more it had to predict: 5.572,
5.558, 5.541 and 5.527 nats at 5e-4, and 5.502, 5.462, 5.433 and 5.412 at 1e-3 (3 seeds).  Yet
beside 15 % at 5e-4 only 30 % at 1e-3 is told from chance (0.14 ± 0.12 better, p = 0.036).

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
