"""How should a small GPT know where a token stands?

python -m lmjax.ablate --config experiments/ablations/positions.py --parallel 2 --workdir DIR

Hardware: 2 shared CPU cores, busy with other work.  Time: 17.5 minutes; a run trains for 1.1.
Result: undecided.  Beside learned positions (4.823 nats; 3 seeds) alibi is 0.28 ± 0.53 better,
rotary 0.25 ± 0.39, none 0.20 ± 0.41, relative 0.17 ± 0.28, and sinusoidal 0.11 ± 0.59 worse.  Seeds
in pairs have a third of the variance that they would have alone.

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
