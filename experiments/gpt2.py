"""GPT-2 (Radford et al., 2019): gpt2.py:small, medium, large or xl, on English web text.

python -m lmjax.main --config experiments/gpt2.py:small --workdir gs://BUCKET/gpt2_small

Hardware: TOPOLOGIES.  Time: not yet run.  Result: not yet run.

The batch is nanoGPT's half million tokens; the schedule its 600,000 steps.
"""

from lmjax import config

LEARNING_RATES = {'small': 6e-4, 'medium': 3e-4, 'large': 2.5e-4, 'xl': 2e-4}  # Brown et al., 2020
VARIANTS = tuple(LEARNING_RATES)
TOPOLOGIES = {  # where it is meant to run -> what it needs there
  'v5e:4x4': {'sharding.data': 4, 'sharding.model': 4},
  'v5p:2x2x4': {'sharding.data': 4, 'sharding.model': 4},
  'h100:8': {'sharding.strategy': 'zero'},
}


def get_config(size='small'):
  c = config.base(objective='clm')
  c.steps, c.batch, c.length = 600_000, 512, 1024
  c.data.train = 'tfds:c4/en#train'
  c.data.eval = {'c4': 'tfds:c4/en#validation'}
  c.tokenizer.vocab_size = 50_257
  c.model.update(size=f'gpt2_{size}', dtype='bfloat16', vocab_multiple=128)
  # By plan, projections of medium would leave 1.8 of 15.75 GiB on v5e:4x4.
  c.model.remat = 'projections' if size == 'small' else 'full'
  c.optimizer.lr = config.choose(size, LEARNING_RATES)
  c.optimizer.update(warmup_steps=2000, final_lr=0.1, weight_decay=0.1, b2=0.95, clip=1.0)
  c.sharding.strategy = 'fsdp'
  c.evaluate.update(every=2000, batches=20)
  c.checkpoint.update(every=2000, keep_every=100_000)
  return c
