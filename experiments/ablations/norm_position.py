"""Norms before each part of a block, after the sum, or around each part; at two learning rates.

python -m lmjax.ablate --config experiments/ablations/norm_position.py --parallel 2 --workdir DIR

Hardware: 2 shared CPU cores, busy with other work.  Time: 20 minutes; a run trains for 1.2.
Result: beside norms before each part (4.685 nats at 1e-3; 3 seeds), after the sum is worse by 1.01
± 0.07 at both rates, and around each part by 0.30 ± 0.06 at 1e-3 and 0.19 ± 0.14 at 3e-3; before
each part at 3e-3 (4.576) is not told from 1e-3 (0.11 ± 0.68 better).

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
