"""A decoder of a billion parameters in the manner of Llama (Touvron et al., 2023), on web text.

python -m lmjax.main --config experiments/gpt_1b.py --workdir gs://BUCKET/gpt_1b

Hardware: TOPOLOGIES.  Time: not yet run.  Result: not yet run.

Rotary positions, RMSNorm, SwiGLU, four key-value heads, no biases; 21 billion tokens, twenty for
each parameter (Hoffmann et al., 2022).
"""

from lmjax import config

TOPOLOGIES = {  # where it is meant to run -> what it needs there
  'v5e:4x4': {
    'sharding.data': 4,
    'sharding.model': 4,
    'micro_batches': 2,
  },
  'v5e:8x8': {'sharding.data': 16, 'sharding.model': 4},
  'h100:8': {'micro_batches': 4},
}


def get_config():
  c = config.base(objective='clm')
  c.steps, c.batch, c.length = 20_000, 512, 2048
  c.data.train = 'tfds:c4/en#train'
  c.data.eval = {'c4': 'tfds:c4/en#validation'}
  c.tokenizer.vocab_size = 32_768
  c.objective.tied = False
  c.model.update(depth=20, dim=2048, heads=16, kv_heads=4, ffn_dim=5632, dtype='bfloat16')
  c.model.update(positions='rotary', norm='rmsnorm', ffn='swiglu', bias=False, remat='full')
  c.optimizer.update(lr=4e-4, warmup_steps=1000, final_lr=0.1, weight_decay=0.1, b2=0.95, clip=1.0)
  c.sharding.strategy = 'fsdp'
  c.evaluate.update(every=1000, batches=20)
  c.checkpoint.update(every=500, keep_every=5000)
  return c
