"""The same Transformer for the same FLOPs as a GPT and as a BERT: who knows more of a token?

python -m lmjax.ablate --config experiments/ablations/gpt_bert.py --seeds 2 --workdir DIR

Hardware: 2 shared CPU cores, busy with other work.  Time: a minute of training a run, of 4.
Result: of the same masked tokens BERT knows less, by 1.05 ± 0.12 nats (5.62 and 4.57; 2 seeds,
p = 0.006), which says nothing of longer runs.

Asked for the same tokens, BERT sees both sides of them and GPT what stands before
(lmjax/yardstick.py).
"""

from lmjax import config

TOPOLOGIES = {'cpu:1': {}}
VARIANTS = ('gpt', 'bert')
MATCH, MAY_MOVE = 'flops', ('objective',)


def get_config(variant='gpt'):
  c = config.base(objective=config.choose(variant, {'gpt': 'clm', 'bert': 'mlm'}))
  c.evaluate.yardstick = 64
  c.steps, c.batch, c.length = 300, 16, 128
  c.tokenizer.update(vocab_size=2048, model_type='unigram')
  c.model.update(depth=2, dim=128, heads=4, positions='rotary', scan=False)
  c.optimizer.update(lr=3e-3, warmup_steps=30, clip=1.0)
  c.checkpoint.every = c.evaluate.every = 100
  return c


def sweep():
  return config.product({'variant': VARIANTS})
