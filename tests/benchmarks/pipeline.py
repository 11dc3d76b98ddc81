"""Million tokens per CPU second, one core, from a built store: batches of clm and of mlm.

python tests/benchmarks/pipeline.py
"""

import json
import statistics
import tempfile
import time

import numpy as np

from lmjax import objectives
from lmjax.data import loader, store, tokenizer


def rate(data: loader.Loader, tokens: int, seconds: float = 2.0) -> float:
  """Median of five."""
  rates = []
  step = 0
  for _ in range(5):
    began, first = time.process_time(), step
    while time.process_time() - began < seconds / 5:
      data.batch(step)
      step += 1
    rates.append((step - first) * tokens / (time.process_time() - began) / 1e6)
  return statistics.median(rates)


def main() -> None:
  rng = np.random.default_rng(0)
  bytes_ = tokenizer.get('bytes', ())
  n, document, sentence = 20_000_000, 1000, 20
  with tempfile.NamedTemporaryFile(suffix='.npy') as file:
    tokens = rng.integers(5, 261, n).astype(np.uint16)
    tokens[document - 1 :: document] = bytes_.eos
    np.save(file.name, tokens)
    mapped = np.load(file.name, mmap_mode='r')
    documents, sentences = (np.arange(0, n + 1, size) for size in (document, sentence))
    corpus = store.Store([mapped], documents, sentences[:-1], n, '')
    cases = {
      'clm 32 x 1024': ('clm', {}, 1024),
      'clm 32 x 1024, documents apart': ('clm', {'separate_documents': True}, 1024),
      'mlm 32 x 512': ('mlm', {}, 512),
      'mlm 32 x 512, whole words': ('mlm', {'masking': 'word'}, 512),
      'mlm 32 x 512, sentence pairs': ('mlm', {'next_sentence': True}, 512),
    }
    result = {}
    for name, (objective, options, length) in cases.items():
      examples = objectives.get(objective, **options).examples(corpus, bytes_, length, seed=0)
      result[name] = round(rate(loader.Loader(examples, 32, 0), 32 * length), 1)
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
