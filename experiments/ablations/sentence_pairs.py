"""Next sentence, order of sentences, or single texts?  What the second task does to the first.

python -m lmjax.ablate --config experiments/ablations/sentence_pairs.py --parallel 2 --workdir DIR

Hardware: 2 shared CPU cores, busy with other work.  Time: 12.5 minutes; a run trains for 1.4.
Result: undecided.  Of the same masked tokens single texts know the most (5.801 nats), beside which
the next sentence is 0.044 ± 0.121 worse and the order of sentences 0.038 ± 0.058 (3 seeds); 34 and
8 more seeds would tell 0.029.

Devlin et al., 2019, have the first; Liu et al., 2019, leave it out; Lan et al., 2020, have the
second. Rows are cut differently with pairs, so that arms are compared by the yardstick.
"""

from lmjax import config

TOPOLOGIES = {'cpu:1': {}}


def get_config():
  c = config.base(objective='mlm')
  c.evaluate.yardstick = 64
  c.steps, c.batch, c.length = 400, 16, 128
  c.tokenizer.update(vocab_size=2048, model_type='unigram')
  c.model.update(size='bert_tiny', initializer='bert', ffn='gelu', scan=False)
  c.model.update(norm_position='post', embed_norm=True)
  c.optimizer.update(lr=1e-3, warmup_steps=40, weight_decay=0.01, clip=1.0)
  c.checkpoint.every = c.evaluate.every = 200
  c.evaluate.batches = 32
  return c


def sweep():
  keys = ('types', 'next_sentence', 'sentence_order')  # `types` alone are single texts, as large
  return [{f'objective.{key}': True} for key in keys]
