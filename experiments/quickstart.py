"""A GPT on the text that every Python installation carries; `quickstart.py:bert` is a BERT.

python -m lmjax.main --config experiments/quickstart.py --workdir /tmp/lmjax/quickstart

Hardware: 2 shared CPU cores.  Time: 5.6 minutes with oracles and evaluations, of which 4 are
training; corpus and tokenizer lay in the cache.  Result: 1.777 bits per byte of validation text
(CPython 3.11.7), where xz -9 has 1.641 and the order-0 entropy is 4.641; of three seeds 1.786, with
a deviation of 0.010.
Curve: training loss 6.616 after 20 steps, 4.796 after 60, 4.373 after 100, 3.845 after 175, 3.565
after 340; 1.936 bits per byte after 175.

python -m lmjax.main --config experiments/quickstart.py:bert --workdir /tmp/lmjax/quickstart_bert

Hardware: 2 shared CPU cores.  Time: 6.2 minutes, of which 3.9 are training.  Result: masked-LM loss
4.380, accuracy 0.304.
Curve: training loss 6.829 after 20 steps, 5.768 after 60, 5.041 after 160, 4.377 after 240, 4.233
after 340; of validation 4.957 after 175.
"""

from lmjax import config

VARIANTS = ('gpt', 'bert')
TOPOLOGIES = {'cpu:1': {}, 'h100:1': {}}


def get_config(variant='gpt'):
  c = config.base(objective=config.choose(variant, {'gpt': 'clm', 'bert': 'mlm'}))
  c.steps, c.batch, c.length = 350, 16, 128
  c.tokenizer.update(vocab_size=4096, model_type='unigram')
  c.model.update(depth=4, dim=192, heads=4, positions='rotary', scan=False)
  # Muon learns from so few tokens what AdamW takes several times as many for.
  c.optimizer.update(name='muon', lr=2e-2, warmup_steps=20, clip=1.0)
  c.optimizer.args = {'adam_learning_rate': 6e-3}
  c.checkpoint.every, c.evaluate.every = 50, 175
  c.log.every = 20
  if variant == 'gpt':
    c.log.sample = 'The function returns'
  return c
