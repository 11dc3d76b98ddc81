"""How should a small GPT know where a token stands?

python -m lmjax.ablate --config experiments/ablations/positions.py --workdir DIR

Hardware: 2 CPU cores.  Time: not yet run.  Result: not yet run.
Su et al., 2021 (rotary); Press et al., 2022 (alibi); Raffel et al., 2020 (relative).
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
  kinds = ['learned', 'sinusoidal', 'rotary', 'alibi', 'relative', 'none']
  return config.product({'model.positions': kinds})
