"""AdamW, Lion and Muon, each at three learning rates around its own usual one.

python -m lmjax.ablate --config experiments/ablations/optimizer.py --parallel 2 --workdir DIR

Hardware: 2 shared CPU cores, busy with other work.  Time: 27 minutes; a run trains for 1.3.
Result: beside AdamW at 1e-3 (4.685 nats; 3 seeds) Muon is better at 3e-3, 1e-2 and 3e-2, by 0.30 ±
0.13, 0.70 ± 0.07 and 0.84 ± 0.15.  AdamW at 3e-3 (4.576) and Lion at 1e-3 (4.681) are not told from
it; AdamW at 1e-2 and Lion at 1e-4 and 3e-4 are worse, by 0.5 ± 0.3, 1.43 ± 0.17 and 0.52 ± 0.04.
The best rates of Lion and Muon lie at the end of the three, and may be beyond.

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
