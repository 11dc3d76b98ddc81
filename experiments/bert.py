"""BERT (Devlin et al., 2019): bert.py:tiny, mini, small, medium, base or large, on Wikipedia.

python -m lmjax.main --config experiments/bert.py:base --workdir gs://BUCKET/bert_base

Hardware: TOPOLOGIES.  Time: not yet run.  Result: not yet run.

The recipe is the paper's Appendix A.2 in one phase of 512 tokens; the small ones are those of Turc
et al., 2019.  Pairs are drawn once and masks anew in every epoch.  The paper's dropout of attention
weights keeps kernels out; --config.model.attention_dropout=0 lets them in.

python tests/benchmarks/bert_instances.py --peer DIR --vocab vocab.txt --data FILES --first 1000

Hardware: 2 shared CPU cores, busy with other work.  Time: 4 CPU minutes, of which its program 3.
Result: of six novels 82,425 instances, random next 0.545, 113.4 tokens, 16.74 predictions.
Published: by google-research/bert's program, which is the recipe, run on the same text, 82,516,
0.545, 113.3, 16.85: it counts [CLS] and [SEP] among the tokens of which 15 % are predicted.
"""

from lmjax import config

VARIANTS = ('tiny', 'mini', 'small', 'medium', 'base', 'large')
TOPOLOGIES = {  # where it is meant to run -> what it needs there
  'v5e:4x4': {'sharding.strategy': 'fsdp', 'sharding.data': 4, 'sharding.model': 4},
  'v5e:2x4': {'sharding.strategy': 'zero'},
  'h100:8': {'sharding.strategy': 'zero'},
}


def get_config(size='base'):
  c = config.base(objective='mlm', tokenizer='wordpiece')
  c.steps, c.batch, c.length = 1_000_000, 256, 512
  c.data.train = 'tfds:wikipedia/20230601.en#train[:99%]'
  c.data.eval = {'wikipedia': 'tfds:wikipedia/20230601.en#train[99%:]'}
  c.tokenizer.vocab_size = 30_522
  c.objective.update(next_sentence=True, predictions=80)
  c.model.update(size=f'bert_{size}', dtype='bfloat16', initializer='bert', ffn='gelu')
  c.model.update(remat='projections', vocab_multiple=128)
  c.model.update(norm_position='post', norm_epsilon=1e-12, embed_norm=True)
  c.model.update(dropout=0.1, attention_dropout=0.1)
  c.optimizer.update(
    lr=1e-4, schedule='linear', warmup_steps=10_000, weight_decay=0.01, clip=1.0, eps=1e-6
  )
  c.evaluate.update(every=10_000, batches=20)
  c.checkpoint.update(every=5000, keep_every=100_000)
  return c
