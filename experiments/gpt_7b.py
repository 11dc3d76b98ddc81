"""A decoder of seven billion parameters with the shape of Mistral 7B (Jiang et al., 2023).

python -m lmjax.main --config experiments/gpt_7b.py --workdir gs://BUCKET/gpt_7b

Hardware: TOPOLOGIES.  Time: not yet run.  Result: not yet run.

Rotary positions, RMSNorm, SwiGLU, eight key-value heads, no biases; 147 billion tokens of web text,
twenty for each parameter (Hoffmann et al., 2022).
"""

from lmjax import config

TOPOLOGIES = {  # where it is meant to run -> what it needs there
  'v5e:16x16': {'sharding.data': 16, 'sharding.model': 16},
  'v5p:4x4x4': {'sharding.data': 16, 'sharding.model': 4},
  'h100:8': {'micro_batches': 16},
}


def get_config():
  c = config.base(objective='clm')
  c.steps, c.batch, c.length = 35_000, 1024, 4096
  c.data.train = 'tfds:c4/en#train'
  c.data.eval = {'c4': 'tfds:c4/en#validation'}
  c.tokenizer.vocab_size = 32_768
  c.objective.tied = False
  c.model.update(depth=32, dim=4096, heads=32, kv_heads=8, ffn_dim=14_336, dtype='bfloat16')
  c.model.update(positions='rotary', norm='rmsnorm', ffn='swiglu', bias=False, remat='full')
  c.optimizer.update(lr=3e-4, warmup_steps=2000, final_lr=0.1, weight_decay=0.1, b2=0.95, clip=1.0)
  c.sharding.strategy = 'fsdp'
  c.evaluate.update(every=1000, batches=20)
  c.checkpoint.update(every=500, keep_every=5000)
  return c
