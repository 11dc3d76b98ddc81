"""A GPT on the text that every Python installation carries; `quickstart.py:bert` is a BERT.

python -m lmjax.main --config experiments/quickstart.py --workdir /tmp/lmjax/quickstart

Hardware: 2 CPU cores.  Time: not yet run.  Result: not yet run.
"""

from lmjax import config


def get_config(kind='gpt'):
  c = config.base(objective={'gpt': 'clm', 'bert': 'mlm'}[kind])
  c.steps = 300
  c.batch, c.length = 16, 128
  c.tokenizer.vocab_size = 4096
  c.tokenizer.model_type = 'unigram'
  c.model.update(depth=4, dim=192, heads=4, scan=False)
  c.optimizer.update(lr=2e-3, warmup_steps=30, clip=1.0, weight_decay=0.1)
  c.checkpoint.every, c.evaluate.every = 100, 100
  if kind == 'gpt':
    c.log.sample = 'The quick brown fox'
  return c
