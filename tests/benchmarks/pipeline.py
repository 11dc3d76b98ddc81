"""Million tokens per CPU second, one core, from a built store: our batches beside plain NumPy.

python tests/benchmarks/pipeline.py
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from lmjax import objectives
from lmjax.data import loader, store, tokenizer

TOKENS, DOCUMENT, SENTENCE, BATCH = 20_000_000, 1000, 20, 256


def seconds(batch: Callable[[int], object], cpu: float = 0.3) -> float:
  """CPU seconds of a batch."""
  step, began = 0, time.process_time()
  while time.process_time() - began < cpu:
    batch(step)
    step += 1
  return (time.process_time() - began) / step


def plain(tokens: np.ndarray, length: int) -> Callable[[int], object]:
  """The limit: rows read at random, one read each, and made int32; no epochs, no order to keep."""
  rng = np.random.default_rng(0)

  def batch(step: int) -> np.ndarray:
    starts = rng.integers(0, len(tokens) - length - 1, BATCH)
    rows = np.stack([tokens[i : i + length + 1] for i in starts]).astype(np.int32)
    return rows[:, :-1], rows[:, 1:]

  return batch


def masked(tokens: np.ndarray, length: int) -> Callable[[int], object]:
  """The same, and 15 % of the places drawn one by one and replaced, as many programs do."""
  rng, rows_of = np.random.default_rng(0), plain(tokens, length)

  def batch(step: int) -> tuple[np.ndarray, ...]:
    rows = rows_of(step)[0]
    chosen = rng.random(rows.shape, np.float32) < 0.15
    kind = rng.random(rows.shape, np.float32)
    inputs = np.where(chosen & (kind < 0.8), 3, rows)
    random = rng.integers(5, 261, rows.shape, np.int32)
    return np.where(chosen & (kind >= 0.9), random, inputs), np.where(chosen, rows, -100)

  return batch


def cases(tokens: np.ndarray) -> dict[str, tuple[int, Callable[[int], object]]]:
  """Name -> tokens in a batch and what makes one."""
  bytes_ = tokenizer.get('bytes', ())
  documents, sentences = (np.arange(0, TOKENS + 1, size) for size in (DOCUMENT, SENTENCE))
  corpus = store.Store([tokens], documents, sentences[:-1], TOKENS, '')
  result = {'plain reads, 1024': (1024, plain(tokens, 1024))}
  result['plain reads and Bernoulli masks, 512'] = (512, masked(tokens, 512))
  for name, (objective, options, length) in {
    'clm, 1024': ('clm', {}, 1024),
    'clm, 1024, documents apart': ('clm', {'separate_documents': True}, 1024),
    'mlm, 512': ('mlm', {}, 512),
    'mlm, 512, whole words': ('mlm', {'masking': 'word'}, 512),
    'mlm, 512, sentence pairs': ('mlm', {'next_sentence': True}, 512),
  }.items():
    examples = objectives.get(objective, **options).examples(corpus, bytes_, length, seed=0)
    result[name] = (length, loader.Loader(examples, BATCH, 0).batch)
  return result


def main() -> None:
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as scratch:
    path = os.path.join(scratch, 'tokens.npy')
    tokens = rng.integers(5, 261, TOKENS).astype(np.uint16)
    tokens[DOCUMENT - 1 :: DOCUMENT] = tokenizer.get('bytes', ()).eos
    np.save(path, tokens)
    made = cases(np.asarray(np.load(path, mmap_mode='r')))
    rounds = [{name: seconds(batch) for name, (_, batch) in made.items()} for _ in range(7)]
  for name, (length, _) in made.items():
    rate = statistics.median(BATCH * length / r[name] / 1e6 for r in rounds)
    print(json.dumps({name: round(rate, 1)}))


if __name__ == '__main__':
  main()
