"""Text into the shards of a token store: sentences, tokens, files, by several processes."""

import concurrent.futures.process
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import uuid
from collections.abc import Sequence

import numpy as np
from etils import epath

from lmjax.data.pieces import Tokenizer
from lmjax.data.sources import Source
from lmjax.errors import UserError

ARRAYS = ('tokens', 'documents', 'sentences', 'bytes', 'replaced')  # the files of a shard
DOCUMENTS_PER_SHARD = 50_000
LEFT = ('shard-*.tmp', 'shard-*.damaged')  # what is there for a moment only
LONGEST_SENTENCE = 10_000  # characters; text without an end of sentence is cut there

# A sentence ends after . ! ? and what closes it, before white space and a capital, a digit or an
# opening mark, or before a blank line.  White space goes with what follows, as in subword tokens.
_END = re.compile(r'[.!?]["\')\]]*(?=\s+["\'(\[]?[A-Z0-9])|(?<=\S)(?=\s*\n\s*\n)')


def split_sentences(text: str) -> list[str]:
  """Cuts a text into sentences; joined, they are the text again."""
  ends = [m.end() for m in _END.finditer(text)]
  bounds = [0, *(e for e in ends if 0 < e < len(text)), len(text)]
  sentences = [text[a:b] for a, b in itertools.pairwise(bounds) if a < b]
  n = LONGEST_SENTENCE
  return [s[i : i + n] for s in sentences for i in range(0, len(s), n)]


def build_shards(source: Source, tokenizer: Tokenizer, directory: epath.Path, alone: bool) -> None:
  """Makes those that are not there yet, several at a time.

  `alone`: no other process makes any, and what one that was killed has left can go.
  """
  n = len(source)
  num_shards = min(n, max(8, -(-n // DOCUMENTS_PER_SHARD)))
  bounds = [n * i // num_shards for i in range(num_shards + 1)]
  jobs = [
    (source, tokenizer, str(directory / f'shard-{i:05d}'), bounds[i], bounds[i + 1])
    for i in range(num_shards)
    if not (directory / f'shard-{i:05d}').exists()
  ]
  directory.mkdir(parents=True, exist_ok=True)
  for left in itertools.chain(*map(directory.glob, LEFT)) if alone else ():
    left.rmtree()
  from tqdm import tqdm  # only a build needs it

  quiet = not sys.stderr.isatty()
  if quiet:
    print(f'tokenizing {source.spec}', flush=True)
  bar = tqdm(total=len(jobs), desc=f'tokenizing {source.spec}', unit='shard', disable=quiet)
  workers = min(len(jobs), os.cpu_count() or 1)
  if workers <= 1:
    with bar:
      for job in jobs:
        _build_shard(*job)
        bar.update()
    return
  # Workers start afresh: a forked child of a process that runs JAX threads may hang.
  context = multiprocessing.get_context('spawn')
  executor = concurrent.futures.ProcessPoolExecutor(workers, context, _live_no_longer_than_parent)
  with bar, executor as pool:
    futures = [pool.submit(_build_shard, *job) for job in jobs]
    try:
      for future in concurrent.futures.as_completed(futures):
        future.result()
        bar.update()
    except concurrent.futures.process.BrokenProcessPool as e:
      raise UserError(
        'a process that tokenizes has died: either memory ran out, or a script of yours lacks '
        "`if __name__ == '__main__':` before its work, which every such process imports"
      ) from e
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _live_no_longer_than_parent() -> None:
  """In a worker: its queue does not tell it that the parent was killed; Ctrl-C is the parent's."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _build_shard(source, tokenizer, path: str, start: int, stop: int) -> None:
  arrays = encode([source[i] for i in range(start, stop)], tokenizer)
  scratch = epath.Path(f'{path}.{uuid.uuid4().hex[:8]}.tmp')
  scratch.mkdir(parents=True)
  for name, array in zip(ARRAYS, arrays, strict=True):
    with (scratch / f'{name}.npy').open('wb') as file:
      np.save(file, array)
      if '://' not in path:  # before the rename: it may outlive a power cut that they do not
        file.flush()
        os.fsync(file.fileno())
  try:
    scratch.rename(path)
  except OSError:  # another build of the same store was faster
    scratch.rmtree()


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[np.ndarray, ...]:
  """What a shard holds of the texts: an array for each of ARRAYS."""
  dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
  chunks, documents, sentences, total = [], [], [], 0
  for text in texts:
    documents.append(total)
    for ids in tokenizer.encode_batch(split_sentences(text)):
      if ids:
        sentences.append(total)
        chunks.append(np.array(ids, dtype))
        total += len(ids)
    chunks.append(np.array([tokenizer.eos], dtype))
    total += 1
  tokens = np.concatenate(chunks) if chunks else np.zeros(0, dtype)
  sizes = [len(text.encode()) for text in texts]
  replaced = [text.count('\ufffd') for text in texts]
  return tokens, *(np.array(x, np.int64) for x in (documents, sentences, sizes, replaced))
