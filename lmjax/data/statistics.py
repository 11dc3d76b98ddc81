"""Numbers about the data of an experiment: a wrong one shows before anything is trained."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lmjax.data import overlap
from lmjax.data.pieces import Tokenizer
from lmjax.data.sources import Source
from lmjax.data.store import Store

ROWS = 1000  # of the training set, spread evenly
PLACES = 1 << 22  # .. that hold so many tokens at most
DOCUMENTS = 1000  # of each source whose words are counted
WINDOW = 200  # bytes that are no coincidence: 50 tokens of the usual size
FREQUENT, RARE = 'frequent: half of all', 'rare: the other half'
ASKED = ('rate', 'mask_share', 'random_share')  # knobs of objectives that predict places
CLASSES = (
  'special',
  'begins a word',
  'goes on in a word',
  'digits',
  'punctuation',
  'white space',
  'part of a character',
)


class Table(NamedTuple):
  title: str
  head: tuple[str, ...]
  lines: list[tuple[str, ...]]
  note: str = ''


class Fate(NamedTuple):
  """How many tokens of a class there are, and what became of those that are predicted."""

  tokens: int
  predicted: int
  masked: int
  random: int  # .. into another token
  kept: int


class Fertility(NamedTuple):
  documents: int  # of which this is known
  words: int  # separated by white space
  tokens: int  # without the ends of texts


def sample(examples: Any) -> dict[str, np.ndarray]:
  """A batch of up to ROWS rows, spread evenly over the first epoch."""
  first = examples(np.zeros(1, np.int64), np.zeros(1, np.int64))
  count = min(ROWS, max(8, PLACES // first['tokens'].shape[1]))
  indices = overlap.spread(len(examples), count)
  return examples(indices, np.zeros_like(indices))


def is_text(batch: Mapping[str, np.ndarray]) -> np.ndarray:
  """bool[B, L], the places that are no padding."""
  return batch.get('segments', batch['weights']) > 0


def fates_of(tokens: np.ndarray, targets: np.ndarray, mask: int | None) -> np.ndarray:
  """What became of targets, by fields of Fate; a random token may be the same by chance: kept."""
  return np.select([tokens == mask, tokens != targets], ['masked', 'random'], 'kept')


def fates(batch: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, Fate]:
  """By class of token, of a batch with `places`: all ordinary ones, what they are, how frequent."""
  rows, slots = np.nonzero(batch['weights'])
  places, targets = batch['places'][rows, slots], batch['targets'][rows, slots]
  fate = np.zeros(batch['tokens'].shape, '<U6')
  fate[rows, places] = fates_of(batch['tokens'][rows, places], targets, tokenizer.mask)
  clean = batch['tokens'].copy()
  clean[rows, places] = targets
  ordinary = is_text(batch) & ~tokenizer.special[clean]
  clean, fate = clean[ordinary], fate[ordinary]
  ids, which, counts = np.unique(clean, return_inverse=True, return_counts=True)
  order = np.argsort(-counts, kind='stable')
  frequent = np.zeros(len(ids), bool)
  frequent[order[: 1 + np.searchsorted(np.cumsum(counts[order]), len(clean) / 2)]] = True
  groups = {'all': np.ones(len(ids), bool)}
  classes = classes_of(ids, tokenizer)
  groups |= {name: classes == i for i, name in enumerate(CLASSES)}
  groups |= {FREQUENT: frequent, RARE: ~frequent}
  made = {name: fate[group[which]] for name, group in groups.items()}
  count = lambda x: [int((x == name).sum()) for name in Fate._fields[2:]]
  return {name: Fate(len(x), int((x != '').sum()), *count(x)) for name, x in made.items() if len(x)}


def classes_of(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """int[n], an index of CLASSES for each id: with a letter, else with a digit, else a sign."""

  def one(i: int) -> str:
    text = tokenizer.decode([i])
    if tokenizer.special[i]:
      return 'special'
    if '\ufffd' in text:
      return 'part of a character'
    if any(map(str.isalpha, text)):
      return 'begins a word' if tokenizer.starts_word[i] else 'goes on in a word'
    if any(map(str.isnumeric, text)):
      return 'digits'
    return 'white space' if not text.strip() else 'punctuation'

  return np.array([CLASSES.index(one(i)) for i in ids.tolist()], np.int64)


def truncated(spans: np.ndarray, store: Store) -> int:
  """How many tokens of the text lie in none of the spans int64[n, 2], that is, in no row."""
  spans = spans[np.argsort(spans[:, 0], kind='stable')]
  starts, reach = spans[:, 0], np.maximum.accumulate(spans[:, 1])
  gaps = np.maximum(np.append(starts, len(store)) - np.append(0, reach), 0)
  ends = store.documents[1:] - 1  # what says that a text ends is none of it
  before = np.searchsorted(starts, ends, 'right') - 1
  return int(gaps.sum() - ((before < 0) | (reach[before] <= ends)).sum())


def fertility(source: Source, store: Store) -> Fertility:
  """Of up to DOCUMENTS documents, spread evenly."""
  chosen = overlap.spread(len(source), DOCUMENTS)
  tokens = int((np.diff(store.documents)[chosen] - 1).sum())
  return Fertility(len(chosen), sum(len(source[i].split()) for i in chosen.tolist()), tokens)


def unknown(store: Store, tokenizer: Tokenizer) -> float:
  """The share of [UNK] among the tokens of a store, or of overlap.BUDGET of them, spread evenly."""
  if tokenizer.unk is None:
    return 0.0
  parts = [store.read(*bounds) for bounds in overlap.stretches(len(store), overlap.BUDGET)]
  return sum(int((x == tokenizer.unk).sum()) for x in parts) / sum(map(len, parts))


def tables(
  tokenizer: Tokenizer,
  sources: Mapping[str, Source],
  stores: Mapping[str, Store],
  examples: Any,
  asked: Mapping[str, float],
) -> list[Table]:
  """All of it to be read: of rows of the training set, of tokenizer and text, of what is twice.

  asked: what the config says of ASKED, where it says anything.
  """
  batch = sample(examples)
  made = [_rows(batch, examples, stores['train'])]
  if 'places' in batch:
    made.append(_fates(batch, tokenizer, asked))
  return [*made, _text(tokenizer, sources, stores), _twice(stores)]


def _rows(batch: Mapping[str, np.ndarray], examples: Any, store: Store) -> Table:
  lost, text = truncated(examples.spans, store), len(store) - store.num_documents
  lines = [
    ('padding', percent((~is_text(batch)).mean())),
    ('text that no row holds', f'{percent(lost / max(1, text))} ({lost:,} tokens)'),
  ]
  for key in batch:
    if key.endswith('_targets'):  # classes
      of = batch[key][batch[key.removesuffix('targets') + 'weights'] > 0]
      shares = [f'{i}: {percent(n / len(of))}' for i, n in enumerate(np.bincount(of)) if n]
      lines.append((key.replace('_', ' '), ', '.join(shares)))
  count, length = batch['tokens'].shape
  title = f'Rows: {count:,} of {len(examples):,}, of {length} places, spread evenly'
  return Table(title, ('of them', 'share'), lines)


def _fates(
  batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, asked: Mapping[str, float]
) -> Table:
  found = fates(batch, tokenizer)
  shares = lambda x, of: tuple(percent(n / of) if of else '–' for n in x)
  lines = [
    (
      name,
      *shares([fate.tokens], found['all'].tokens),
      *shares([fate.predicted], fate.tokens),
      *shares(fate[2:], fate.predicted),
    )
    for name, fate in found.items()
  ]
  if set(asked) == set(ASKED):
    rest = 1 - asked['mask_share'] - asked['random_share']
    lines.insert(0, ('asked for', '', *(percent(asked[key]) for key in ASKED), percent(rest)))
  head = ('of the text', 'predicted', 'as [MASK]', 'at random', 'as it is')
  note = 'Special tokens and padding are no text. A random token that is the same counts as kept.'
  return Table('What is predicted in them', ('ordinary tokens', *head), lines, note)


def _text(
  tokenizer: Tokenizer, sources: Mapping[str, Source], stores: Mapping[str, Store]
) -> Table:
  lines = []
  for name, store in stores.items():
    found = fertility(sources[name], store)
    size = f'{store.num_documents:,}', f'{len(store):,}', f'{store.replaced[0]:,}'
    each = store.num_bytes / max(1, len(store) - store.num_documents)
    numbers = f'{found.tokens / max(1, found.words):.2f}', f'{each:.2f}'
    lines.append((name, *size, *numbers, percent(unknown(store, tokenizer))))
  head = ('documents', 'tokens', 'U+FFFD', 'tokens a word', 'bytes a token', 'unknown')
  title = f'Text, as {tokenizer.name} of {tokenizer.vocab_size:,} ids spells it'
  note = 'Words are what white space separates'
  if any(store.num_documents > DOCUMENTS for store in stores.values()):
    note += f'; they are counted in {DOCUMENTS:,} documents of each, spread evenly'
  if max(map(len, stores.values())) > overlap.BUDGET:
    note += f'; unknown ones in {overlap.BUDGET:,} tokens'
  return Table(title, ('', *head), lines, note + '. U+FFFD is counted in characters.')


def _twice(stores: Mapping[str, Store]) -> Table:
  train, others = stores['train'], {k: x for k, x in stores.items() if k != 'train'}
  n = max(1, math.ceil(WINDOW * len(train) / max(1, train.num_bytes)))
  one_in = max(map(overlap.sampling, stores.values()))
  of_train = overlap.documents(train, one_in)
  itself = lambda name, found: (f'{name}, earlier in itself', *_shares(found, found.repeated), '–')
  lines = [itself('train', of_train)]
  quoted = overlap.windows(train, others, n)
  for name, store in others.items():
    found = overlap.documents(store, one_in)
    alone = overlap.documents(store, overlap.sampling(store))
    again = np.isin(found.hashes, of_train.hashes)
    lines += [
      itself(name, alone),
      (f'{name}, in train', *_shares(found, again), percent(quoted[name])),
    ]
  note = f'Windows are of {n} tokens in a row, about {WINDOW} bytes, that stand in train, too.'
  if one_in > 1:
    note += (
      f' Documents of one in {one_in} lengths were compared with train: {percent(of_train.share)} '
      'of it.'
    )
  if len(train) > overlap.BUDGET:
    read = overlap.BUDGET / len(train)
    note += f' {percent(read)} of train was read for windows: their share is at least this.'
  if max(map(len, others.values()), default=0) > overlap.EVALUATED:
    note += f' Of larger sets {overlap.EVALUATED:,} tokens were looked at, spread evenly.'
  head = ('documents', 'their tokens', 'tokens in windows')
  return Table('What is there twice', ('share of', *head), lines, note)


def _shares(found: overlap.Documents, again: np.ndarray) -> tuple[str, str]:
  tokens = found.lengths.sum()
  if not tokens:
    return '–', '–'
  return percent(again.mean()), percent(found.lengths[again].sum() / tokens)


def percent(share: float) -> str:
  return f'{100 * share:.1f} %' if share >= 1e-3 else f'{100 * share:.2g} %'
