"""From documents to rows: windows, full sentences, sentence pairs.  Pure functions of the store.

b rows of a batch, L length; places are token numbers in the store.
"""

import bisect

import numpy as np

from lmjax.data.pieces import Tokenizer
from lmjax.data.store import Store


def windows(store: Store, starts: np.ndarray, length: int) -> np.ndarray:
  """Tokens int32[b, length] from each start on, in a ring: after the last comes the first."""
  n = len(store)
  tokens = np.empty((len(starts), length), np.int32)
  for row, start in zip(tokens, (starts % n).tolist(), strict=True):
    filled = 0
    while filled < length:
      part = store.read(start, min(start + length - filled, n))
      row[filled : filled + len(part)] = part
      filled, start = filled + len(part), 0
  return tokens


def spans(store: Store, bounds: np.ndarray, length: int, tokenizer: Tokenizer) -> np.ndarray:
  """Rows int32[b, length] of [CLS], the tokens of one of the spans int64[b, 2], [SEP], padding."""
  rows = np.full((len(bounds), length), tokenizer.pad, np.int32)
  rows[:, 0] = tokenizer.cls
  for row, (start, stop) in zip(rows, bounds.tolist(), strict=True):
    end = 1 + stop - start
    row[1:end] = store.read(start, stop)
    row[end] = tokenizer.sep
  return rows


def document_segments(tokens: np.ndarray, real: np.ndarray, eos: int) -> tuple[np.ndarray, ...]:
  """(segments, positions), each int32[b, L], for rows cut from the stream of documents.

  The end-of-text token opens the document that follows, whose first token is predicted from it.
  Segments count from 1, and 0 is padding; positions restart with each segment.
  """
  opens = tokens == eos
  segments = np.where(real, 1 + np.cumsum(opens, axis=1), 0)
  places = np.arange(tokens.shape[1])
  first = np.maximum.accumulate(np.where(opens, places, 0), axis=1)
  return segments.astype(np.int32), (places - first).astype(np.int32)


def sentence_windows(store: Store, capacity: int) -> np.ndarray:
  """int64[n + 1] bounds of rows of full sentences, each of at most `capacity` tokens.

  Sentences are taken in order, across documents (RoBERTa's FULL-SENTENCES; Liu et al., 2019).
  Nothing is dropped: a sentence longer than a row is cut where rows end.
  """
  total, sentences = len(store), store.sentences
  # A sentence that no row can hold may be cut anywhere, so a row that it follows is filled with it.
  long = np.flatnonzero(np.diff(sentences, append=total) > capacity)
  cuttable = zip(
    sentences[long].tolist(), np.append(sentences, total)[long + 1].tolist(), strict=True
  )
  fixed, ends = sentences.tolist(), dict(cuttable)
  bounds, place = [0], 0
  while total - place > capacity:
    start = fixed[bisect.bisect_right(fixed, place + capacity) - 1]  # the last that is in reach
    in_long = ends.get(start, start) > place + capacity
    place = place + capacity if in_long else start
    bounds.append(place)
  return np.array([*bounds, total], np.int64)


def sentence_pairs(
  store: Store, capacity: int, seed: int, short_prob: float, copies: int, ordered: bool
) -> np.ndarray:
  """int64[n, 5] rows (a_start, a_stop, b_start, b_stop, label): BERT's pairs of text segments.

  The recipe of Devlin et al., 2019: sentences of a document are gathered until they fill a row of
  `capacity` tokens (in a share `short_prob` of the documents, of some random shorter length, drawn
  once a document as in the authors' program); a random number of them is A; B is what follows
  (label 0) or, half of the time, text from another document (label 1), in which case the sentences
  not used are gathered again.  Pairs that are too long lose tokens at the ends of their longer
  half.  `copies` repeats the corpus with other draws.

  `ordered`: B always follows A, and half of the pairs are swapped (label 1): the sentence-order
  prediction of Lan et al., 2020.
  """
  documents = _sentence_bounds(store)
  pairs = []
  for copy in range(copies):
    for index, document in enumerate(documents):
      if len(document) > 1:
        rng = np.random.default_rng([seed, copy, index])
        pairs += _document_pairs(documents, index, rng, capacity, short_prob, ordered)
  return np.array(pairs, np.int64).reshape(-1, 5)


def _sentence_bounds(store: Store) -> list[list[int]]:
  """For each document, where its sentences begin and, last, where its text ends."""
  ends = store.documents[1:] - 1  # the end-of-text token belongs to no sentence
  first = np.searchsorted(store.sentences, store.documents)
  starts = store.sentences.tolist()
  triples = zip(first.tolist(), first[1:].tolist(), ends.tolist(), strict=False)
  return [[*starts[a:b], end] for a, b, end in triples]


def _document_pairs(documents, index, rng, capacity, short_prob, ordered) -> list[tuple[int, ...]]:
  document = documents[index]
  last = len(document) - 1  # the number of sentences
  target = int(rng.integers(2, capacity + 1)) if rng.random() < short_prob else capacity
  pairs, begin = [], 0
  while begin < last:
    end = begin + 1
    while end < last and document[end] - document[begin] < target:
      end += 1
    split = begin + (int(rng.integers(1, end - begin)) if end - begin > 1 else 1)
    a = [document[begin], document[split]]
    b, label = [document[split], document[end]], 0
    if ordered and end - begin == 1:  # one long sentence: its halves are the pair
      middle = (a[0] + a[1] + 1) // 2
      a, b = [a[0], middle], [middle, a[1]]
    elif not ordered and (end - begin == 1 or rng.random() < 0.5):
      b, label = _from_another(documents, index, rng, target - (a[1] - a[0])), 1
      end = split
    _truncate(a, b, capacity, rng)
    if ordered and rng.random() < 0.5:
      a, b, label = b, a, 1
    pairs.append((*a, *b, label))
    begin = end
  return pairs


def _from_another(documents, index, rng, target: int) -> list[int]:
  """Sentences of another document, from a random one on, until they hold `target` tokens."""
  while True:
    other = int(rng.integers(len(documents)))
    if other != index and len(documents[other]) > 1:
      break
  document = documents[other]
  begin = int(rng.integers(len(document) - 1))
  end = begin + 1
  while end < len(document) - 1 and document[end] - document[begin] < target:
    end += 1
  return [document[begin], document[end]]


def _truncate(a: list[int], b: list[int], capacity: int, rng) -> None:
  """Shortens the longer of the two, token by token, at a random end."""
  excess = a[1] - a[0] + b[1] - b[0] - capacity
  for front in rng.random(max(excess, 0)) < 0.5:
    longer = a if a[1] - a[0] > b[1] - b[0] else b
    if front:
      longer[0] += 1
    else:
      longer[1] -= 1


def pack_rows(lengths: np.ndarray, length: int, slots: int) -> np.ndarray:
  """int64[rows, slots]: which items share a row, in order; -1 is an empty slot.

  An item goes to the fullest row with room for it among the 64 that were opened last.
  """
  if slots == 1:
    return np.arange(len(lengths))[:, None]
  rows: list[list[int]] = []
  room: list[int] = []
  for item, size in enumerate(lengths.tolist()):
    recent = range(max(0, len(rows) - 64), len(rows))
    fitting = [r for r in recent if room[r] >= size and len(rows[r]) < slots]
    best = min(fitting, key=room.__getitem__, default=None)
    if best is None:
      best = len(rows)
      rows.append([])
      room.append(length)
    rows[best].append(item)
    room[best] -= size
  return np.array([row + [-1] * (slots - len(row)) for row in rows], np.int64).reshape(-1, slots)
