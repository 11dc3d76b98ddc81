"""Norms before each part of a block, after the sum, or around each part; at two learning rates.

python -m lmjax.ablate --config experiments/ablations/norm_position.py --workdir DIR

Hardware: 2 CPU cores.  Time: not yet run.  Result: not yet run.
Xiong et al., 2020: after the sum it wants a warm-up and a smaller learning rate.
"""

from lmjax import config

TOPOLOGIES = {'cpu:1': {}}


def get_config():
  c = config.base(objective='clm')
  c.steps, c.batch, c.length = 200, 16, 128
  c.tokenizer.update(vocab_size=2048, model_type='unigram')
  c.model.update(depth=2, dim=128, heads=4, positions='rotary', scan=False)
  c.optimizer.update(lr=3e-3, warmup_steps=20, clip=1.0)
  c.checkpoint.every = c.evaluate.every = 100
  c.evaluate.batches = 32
  return c


def sweep():
  positions = {'model.norm_position': ['pre', 'post', 'both']}
  return config.product(positions, {'optimizer.lr': [1e-3, 3e-3]})
