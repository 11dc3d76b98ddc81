"""What others publish, beside `transformers`: vocabularies id for id, and a whole BERT.

python -m tests.benchmarks.published DIR …

It needs pip install -e '.[parity]'.  A DIR holds a tokenizer in one form or several (vocab.txt;
encoder.json with vocab.bpe, or as vocab.json with merges.txt; tokenizer.json; a sentencepiece model
of T5's kind), each of which is tried alone, and may hold a BERT, of which hidden states are
compared, and the bits of its arrays after import and export.
"""

import argparse
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
import torch
import transformers
from etils import epath

from lmjax import huggingface
from lmjax.data import python_corpus
from lmjax.huggingface import tokens
from tests.parity.tokens_test import TEXTS

# Files by their names -> those by which `transformers` knows them, and what reads them there.
FORMS = {
  ('vocab.txt',): (('vocab.txt',), transformers.BertTokenizer),
  ('vocab.json', 'merges.txt'): (('vocab.json', 'merges.txt'), transformers.GPT2Tokenizer),
  ('encoder.json', 'vocab.bpe'): (('vocab.json', 'merges.txt'), transformers.GPT2Tokenizer),
  ('spiece.model',): (('spiece.model',), transformers.T5Tokenizer),
  ('t5_spiece.model',): (('spiece.model',), transformers.T5Tokenizer),
  ('tokenizer.json',): (('tokenizer.json',), transformers.PreTrainedTokenizerFast),
}
MOST = 20_000  # characters of a text
ROWS, LENGTH = 16, 128  # for a model


def vocabularies(directory: pathlib.Path, texts: list[str]) -> Iterator[str]:
  for names, (usual, kind) in FORMS.items():
    if not all((directory / name).exists() for name in names):
      continue
    with tempfile.TemporaryDirectory() as scratch:
      for name, other in zip(names, usual, strict=True):
        shutil.copy(directory / name, pathlib.Path(scratch) / other)
      theirs = kind.from_pretrained(scratch)
      extra = 100 if kind is transformers.T5Tokenizer else 0  # are not in its file
      ours = tokens.find(epath.Path(scratch), len(theirs) - extra)
    expected = [theirs(text, add_special_tokens=False)['input_ids'] for text in texts]
    wrong = [t for t, ids in zip(texts, expected, strict=True) if ours.encode(t) != ids]
    said = f'{len(texts)} texts of {sum(map(len, expected)):,} tokens, {len(wrong)} otherwise'
    shown = ''.join(f'\n  {text[:60]!r}' for text in wrong[:8])
    yield f'{" with ".join(names)}, {ours.vocab_size:,} ids: {said}{shown}'


def model(directory: pathlib.Path, texts: list[str]) -> Iterator[str]:
  theirs = transformers.AutoModel.from_pretrained(directory).eval()
  made, params, tokenizer = huggingface.load(directory)
  rows = [ids for text in texts if len(ids := tokenizer.encode(text)) >= LENGTH][:ROWS]
  tokens_BL = np.array([ids[:LENGTH] for ids in rows])
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens_BL)).last_hidden_state.numpy()
  found = made.apply({'params': params}, tokens_BL, method='encode')
  difference = np.abs(jax.device_get(found) - expected).max()
  yield f'{len(rows)} rows: hidden states within {difference:.1e} of {np.abs(expected).max():.1f}'
  with tempfile.TemporaryDirectory() as scratch:
    huggingface.to_workdir(directory, f'{scratch}/run')
    huggingface.from_workdir(f'{scratch}/run', f'{scratch}/out')
    again = dict(transformers.AutoModel.from_pretrained(f'{scratch}/out').named_parameters())
  there = dict(theirs.named_parameters())
  same = [torch.equal(x, again[name]) for name, x in there.items()]
  yield f'after import and export {sum(same)} of {len(same)} arrays have the same bits'


def main() -> None:
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('directories', nargs='+', type=pathlib.Path)
  long = [text[:MOST] for _, text in sorted(python_corpus.collect()[0].items())]
  texts = [*TEXTS, *long[:: max(1, len(long) // 500)]]
  for directory in parser.parse_args().directories:
    print(directory)
    for line in vocabularies(directory, texts):
      print(line, flush=True)
    for line in model(directory, texts) if (directory / 'config.json').exists() else ():
      print(line, flush=True)


if __name__ == '__main__':
  main()
