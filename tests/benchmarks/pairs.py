"""Sentence pairs beside those of BERT's own program, from the same sentences.

python tests/benchmarks/pairs.py --bert DIR --data 'FILES' [--document file|line|paragraph]

DIR is a checkout of github.com/google-research/bert, whose create_pretraining_data.py runs here
with as much of TensorFlow as it asks for on import; FILES is a source of documents.  Printed for
both: how many pairs, the share of random followers, quantiles of the lengths of both halves.
"""

import argparse
import itertools
import json
import pathlib
import random
import sys
import types
from typing import Any
from unittest import mock

import numpy as np

from lmjax.data import pack, sources, store, tokenizer

LENGTH, SHORT, COPIES = 128, 0.1, 3


def original(checkout: str, documents: list[list[list[str]]]) -> np.ndarray:
  """int[n, 3]: lengths of A and B, and whether B is random."""
  nothing = types.SimpleNamespace(FLAGS=None, flags=mock.MagicMock())
  with mock.patch.dict(sys.modules, tensorflow=nothing, tokenization=mock.MagicMock()):
    program: dict[str, Any] = {'__name__': 'create_pretraining_data'}
    path = pathlib.Path(checkout, 'create_pretraining_data.py')
    exec(compile(path.read_text(), path, 'exec'), program)
  # The pairs do not depend on the masks.
  program['create_masked_lm_predictions'] = lambda tokens, *rest: (tokens, [], [])
  rng, rows = random.Random(0), []
  for _ in range(COPIES):
    for index in range(len(documents)):
      make = program['create_instances_from_document']
      for x in make(documents, index, LENGTH, SHORT, 0.15, 20, [], rng):
        b = sum(x.segment_ids)
        rows.append((len(x.tokens) - b - 2, b - 1, x.is_random_next))
  return np.array(rows, int)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--bert', required=True)
  parser.add_argument('--data', required=True)
  parser.add_argument('--document', default='file')
  a = parser.parse_args()
  source = sources.open_source(a.data, document=a.document, text_key='text', cache='/tmp/lmjax')
  texts = [source[i] for i in range(len(source))]
  bytes_ = tokenizer.get('bytes', ())
  corpus = store.from_documents(texts, bytes_)
  bounds = [b for b in pack._sentence_bounds(corpus) if len(b) > 1]
  documents = [[['x'] * (j - i) for i, j in itertools.pairwise(b)] for b in bounds]
  pairs = pack.sentence_pairs(corpus, LENGTH - 3, 0, SHORT, COPIES, ordered=False)
  ours = np.stack([pairs[:, 1] - pairs[:, 0], pairs[:, 3] - pairs[:, 2], pairs[:, 4]], axis=1)
  for name, rows in {'lmjax': ours, 'bert': original(a.bert, documents)}.items():
    quantiles = np.quantile(rows[:, :2], [0.1, 0.25, 0.5, 0.75, 0.9], axis=0).T
    said = {'pairs': len(rows), 'random': round(rows[:, 2].mean(), 4)}
    said |= {'A': quantiles[0].tolist(), 'B': quantiles[1].tolist()}
    said['tokens'] = round(float(rows[:, :2].sum(axis=1).mean()), 2)
    print(name, json.dumps(said))


if __name__ == '__main__':
  main()
