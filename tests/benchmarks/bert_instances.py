"""Training instances beside those of BERT's own program, from the same text and vocabulary.

python tests/benchmarks/bert_instances.py --peer DIR --vocab vocab.txt --data 'FILES'

DIR is a checkout of github.com/google-research/bert, whose create_training_instances runs here with
as much of TensorFlow as it asks for; FILES is a source of texts, cut into documents of as many
sentences each, of which the program gets one a line.  Both make `--copies` copies with each of
`--seeds` seeds from `--first` on.
For each statistic are printed both means over the seeds, and their difference in units of its own
standard error, which says what these seeds can tell apart.
"""

import argparse
import functools
import importlib
import json
import pathlib
import random
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import numpy as np

from lmjax import objectives
from lmjax.data import building, sources, store, tokenizer
from lmjax.data.pieces import Tokenizer

RATE, SHORT = 0.15, 0.1
Rows = np.ndarray  # int64[n, 7]: tokens of A and of B, random B, predictions, [MASK], random, kept


def documents(data: str, sentences: int) -> list[list[str]]:
  """Sentences of documents, each on one line."""
  source = sources.open_source(data)
  found = (building.split_sentences(source[i]) for i in range(len(source)))
  lines = [[line for s in text if (line := ' '.join(s.split()))] for text in found]
  starts = ((text, i) for text in lines for i in range(0, len(text), sentences))
  return [text[i : i + sentences] for text, i in starts]


def program(checkout: str) -> tuple[Any, Any]:
  """Its two modules; TensorFlow opens files for them and holds a flag."""
  flags = mock.MagicMock()
  flags.FLAGS = types.SimpleNamespace(do_whole_word_mask=False)
  gfile = types.SimpleNamespace(GFile=functools.partial(open, encoding='utf-8'))
  tensorflow = types.SimpleNamespace(flags=flags, gfile=gfile)
  path = [checkout, *sys.path]
  with mock.patch.dict(sys.modules, tensorflow=tensorflow), mock.patch.object(sys, 'path', path):
    return tuple(map(importlib.import_module, ('create_pretraining_data', 'tokenization')))


def theirs(make: Callable[[random.Random], Iterable[Any]], seed: int) -> Rows:
  rows = []
  for x in make(random.Random(seed)):
    b = sum(x.segment_ids)
    now = [x.tokens[place] for place in x.masked_lm_positions]
    masked = now.count('[MASK]')
    kept = sum(a == b for a, b in zip(now, x.masked_lm_labels, strict=True))
    counts = (len(now), masked, len(now) - masked - kept, kept)
    rows.append((len(x.tokens) - b - 2, b - 1, x.is_random_next, *counts))
  return np.array(rows, np.int64)


def ours(corpus: store.Store, words: Tokenizer, seed: int, a: argparse.Namespace) -> Rows:
  objective = objectives.get(
    name='mlm',
    next_sentence=True,
    dynamic=False,
    rate=RATE,
    short_seq_prob=SHORT,
    predictions=a.predictions,
    dupe_factor=a.copies,
  )
  examples, rows = objective.examples(corpus, words, a.length, seed), []
  for chosen in np.array_split(np.arange(len(examples)), max(1, len(examples) // 1024)):
    batch = examples(chosen, np.zeros_like(chosen))
    second = batch['types'].sum(axis=1)
    first = (batch['segments'] > 0).sum(axis=1) - second
    real = batch['weights'] > 0
    now = np.take_along_axis(batch['tokens'], batch['places'], axis=1)
    masked, kept = real & (now == words.mask), real & (now == batch['targets'])
    counts = [x.sum(axis=1) for x in (real, masked, real & ~masked & ~kept, kept)]
    rows.append(np.stack([first - 2, second - 1, batch['pair_targets'][:, 0], *counts], axis=1))
  return np.concatenate(rows).astype(np.int64)


def statistics(rows: Rows, length: int) -> dict[str, float]:
  a, b, is_random, *predicted = rows.T.astype(float)
  size = a + b + 3
  found = {'instances': len(rows), 'random next': is_random.mean(), 'tokens': size.mean()}
  found |= {'shorter than a row': (size < length).mean(), 'than half': (size < length / 2).mean()}
  found |= {'predictions': predicted[0].mean()}
  full = size == length
  found |= {'in a full row': predicted[0][full].mean(), 'in others': predicted[0][~full].mean()}
  shares = zip(('[MASK]', 'random', 'kept'), predicted[1:], strict=True)
  found |= {name: count.sum() / predicted[0].sum() for name, count in shares}
  for name, lengths in (('A', a), ('B', b)):
    for q in (10, 25, 50, 75, 90):
      found[f'{name}, {q}th percentile'] = np.percentile(lengths, q)
  return {name: float(x) for name, x in found.items()}


def compared(mine: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> None:
  for name in mine[0]:
    both = [np.array([found[name] for found in side]) for side in (mine, other)]
    means = [float(x.mean()) for x in both]
    error = float(np.sqrt(sum(x.var(ddof=1) / len(x) for x in both)))
    said = {'lmjax': round(means[0], 4), 'bert': round(means[1], 4)}
    said['difference / error'] = round((means[0] - means[1]) / error, 1) if error else None
    print(name, json.dumps(said), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser()
  for name in ('peer', 'vocab', 'data'):
    parser.add_argument(f'--{name}', required=True)
  counts = {'sentences': 50, 'seeds': 20, 'first': 0, 'copies': 5, 'length': 128, 'predictions': 20}
  for name, default in counts.items():
    parser.add_argument(f'--{name}', type=int, default=default)
  a = parser.parse_args()
  texts = documents(a.data, a.sentences)
  words = tokenizer.get('wordpiece', (), path=a.vocab, vocab_size=0)
  create, tokenization = program(a.peer)
  split = tokenization.FullTokenizer(vocab_file=a.vocab, do_lower_case=True)
  split.tokenize = functools.cache(split.tokenize)  # every seed would do it again
  ids = lambda line: split.convert_tokens_to_ids(split.tokenize(line))
  lines = [line for text in texts for line in text]
  differ = sum(words.encode(line) != ids(line) for line in lines)
  print(json.dumps({'documents': len(texts), 'sentences': len(lines), 'other tokens': differ}))
  # Of the same sentences, whatever both would make of a text that is not cut yet.
  with mock.patch.object(building, 'split_sentences', lambda text: text.split('\n')):
    corpus = store.from_documents(['\n'.join(text) for text in texts], words)
  mine, other = [], []
  with tempfile.TemporaryDirectory() as scratch:
    file = pathlib.Path(scratch, 'text')
    file.write_text('\n\n'.join('\n'.join(text) for text in texts), encoding='utf-8')
    knobs = ([str(file)], split, a.length, a.copies, SHORT, RATE, a.predictions)
    make = lambda rng: create.create_training_instances(*knobs, rng)
    for seed in range(a.first, a.first + a.seeds):
      clock = [time.process_time()]
      mine.append(statistics(ours(corpus, words, seed, a), a.length))
      clock.append(time.process_time())
      other.append(statistics(theirs(make, seed), a.length))
      clock.append(time.process_time())
      print('CPU seconds', np.round(np.diff(clock), 1).tolist(), file=sys.stderr, flush=True)
  compared(mine, other)


if __name__ == '__main__':
  main()
