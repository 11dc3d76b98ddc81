"""AdamW, Lion and Muon, each at three learning rates around its own usual one.

python -m lmjax.ablate --config experiments/ablations/optimizer.py --workdir DIR

Hardware: 2 CPU cores.  Time: not yet run.  Result: not yet run.
Chen et al., 2023 (Lion, a third to a tenth of AdamW's rate); Jordan et al., 2024 (Muon).
Arms are many: with 3 seeds only large differences are told from chance.
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
  rates = {'adamw': [1e-3, 3e-3, 1e-2], 'lion': [1e-4, 3e-4, 1e-3], 'muon': [3e-3, 1e-2, 3e-2]}
  parts = [{'optimizer.name': [name], 'optimizer.lr': lrs} for name, lrs in rates.items()]
  return config.chain(*parts)
