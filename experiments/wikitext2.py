"""Words of WikiText-2 (Merity et al., 2017): small Transformers.

python -m lmjax.main --config experiments/wikitext2.py:gpu --workdir /tmp/lmjax/wikitext2_gpu

Hardware: TOPOLOGIES.  Time: not yet run.  Result: not yet run.
Published: test perplexity 65.8 (AWD-LSTM; Merity et al., 2018).

python -m lmjax.main --config experiments/wikitext2.py:cpu --workdir /tmp/lmjax/wikitext2

Hardware: 2 shared CPU cores, busy with other work.  Time: 52 minutes without oracles, of which 11
are evaluations.  Result: perplexity 132.0 of the test words and 141.1 of the validation words,
after one epoch.
Published: 65.8 of the test words (AWD-LSTM, hundreds of epochs; Merity et al., 2018).
Curve: test perplexity 255.9 after 500 steps, 174.0 after 1000, 141.4 after 1500, 132.0 after 2000.

(117.61, 110.44 and 87.17, which pytorch/examples once gave, are its figures of the Penn Treebank.)

Its files have a line a paragraph, and blank ones, which count: the end of every line is a word of
the 33,278, and so is written down, here of the training text (the same of valid and test):

  sed 's/$/ <eos>/' wiki.train.tokens > wiki.train.eos

wiki2.json is made of wiki.train.eos as penn_treebank.py makes ptb.json, and has one token more,
which ends the file.  The targets are 217,646 and 245,569 then, as in the literature, with that end
for the first word, and eval/test/perplexity is a word's.  With any lossless tokenizer of subwords,
on the files as they are, a word's perplexity is 2 ** (eval/test/bits_per_byte * bytes / 245_569),
where `bytes` are those of wiki.test.tokens.
"""

from lmjax import config

VARIANTS = ('gpu', 'cpu')
TOPOLOGIES = {'h100:1': {}, 'cpu:1': {}}  # the first variant, and the second


def get_config(variant='gpu'):
  c = config.base(objective='clm', tokenizer='published')
  c.data.train = 'wiki.train.eos'
  c.data.eval = {'validation': 'wiki.valid.eos', 'test': 'wiki.test.eos'}
  c.tokenizer.update(path='wiki2.json', vocab_size=33_279)
  c.optimizer.update(name='muon', lr=2e-2, warmup_steps=200, clip=1.0)
  c.optimizer.args = {'adam_learning_rate': 5e-3}
  c.evaluate.every = c.checkpoint.every = 500
  c.checkpoint.keep_best = 'eval/validation/loss'
  config.choose(variant, {'gpu': gpu, 'cpu': cpu})(c)
  return c


def gpu(c):
  c.steps, c.batch, c.length = 10_000, 32, 128  # twenty epochs
  c.model.update(depth=4, dim=256, heads=4, positions='rotary', dropout=0.4)


def cpu(c):
  c.steps, c.batch, c.length = 2000, 8, 128  # an epoch
  c.model.update(depth=3, dim=192, heads=4, positions='rotary', dropout=0.1, scan=False)
  c.log.every = 50
