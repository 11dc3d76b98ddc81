"""Looks at the data of an experiment:  python -m lmjax.data build|show --config FILE.py

build: makes the tokenizer and the token stores ahead of time, and says what they hold.
show: prints rows of the training data as the model sees them.
"""

import sys

import numpy as np
from absl import flags
from ml_collections import config_flags

from lmjax import command, config, experiment
from lmjax.errors import UserError
from lmjax.terminal import say


def build(parts: experiment.Experiment) -> None:
  t = parts.tokenizer
  print(f'tokenizer {t.name}: {t.vocab_size:,} ids, fingerprint {t.fingerprint}')
  for name, store in parts.stores.items():
    examples = parts.examples(name)
    length = parts.config['length']
    tokens, rows = len(store), len(examples)
    print(
      f'{name}: {store.num_documents:,} documents, {store.num_bytes:,} bytes, {tokens:,} tokens '
      f'({store.num_bytes / tokens:.2f} bytes each), {rows:,} rows of {length}, '
      f'{_share_of_text(examples):.1%} of them text; digest {store.digest}; {store.path}'
    )


def _share_of_text(examples) -> float:
  """The share of places that are no padding, in up to 1,000 rows spread over the corpus."""
  indices = np.unique(np.linspace(0, len(examples) - 1, 1000).astype(np.int64))
  rows = examples(indices, np.zeros_like(indices))
  weights = next(value for key, value in rows.items() if key.endswith('weights'))
  return (rows.get('segments', weights) > 0).mean()


def show(parts: experiment.Experiment, count: int) -> None:
  t, examples = parts.tokenizer, parts.examples('train')
  indices = np.arange(min(count, len(examples)))
  rows = examples(indices, np.zeros_like(indices))
  for index in indices:
    print(f'--- row {index}')
    for key, value in rows.items():
      shown = value[index].tolist()
      if key in ('tokens', 'targets'):
        # Ids are shown one by one, since special ones decode to nothing.
        words = [t.decode([i]) if not t.special[i] else _special(t, i) for i in shown]
        shown = '|'.join(words).replace('\n', '\\n')
      print(f'{key}: {shown}')


def _special(t, i: int) -> str:
  names = {getattr(t, name): name.upper() for name in ('pad', 'unk', 'cls', 'sep', 'mask')}
  return f'[{names.get(i, i)}]'


def main() -> None:
  command, f = sys.argv[1], flags.FLAGS
  if f.config is None:
    raise UserError('name an experiment with --config FILE.py[:ARGUMENT]')
  if f.rows < 1:
    raise UserError(f'--rows={f.rows} must be at least 1')
  parts = experiment.prepare(config.resolve(f.config))
  if command == 'build':
    build(parts)
  else:
    show(parts, f.rows)


if __name__ == '__main__':
  if '--help' in sys.argv:
    print(__doc__)
    sys.exit()
  if sys.argv[1:2] not in (['build'], ['show']):
    say('say what to do: build or show')
    sys.exit(2)
  config_flags.DEFINE_config_file('config', None, 'The experiment: FILE.py[:ARGUMENT].')
  flags.DEFINE_integer('rows', 3, 'How many rows to show.')
  command.run(main, sys.argv[:1] + sys.argv[2:])
