"""Numbers about the data, against loops that count."""

import collections
import itertools
import random

import numpy as np
import pytest

from lmjax.data import overlap, show, statistics, store, tokenizer
from tests.conftest import documents
from tests.contract_test import OBJECTIVES, make

MASKED = [name for name, (objective, _) in OBJECTIVES.items() if objective == 'mlm']
T = tokenizer.get('bytes', ())


def small(monkeypatch, **sizes):
  for name, size in sizes.items():
    monkeypatch.setattr(overlap, name, size)


def in_shards(texts: list[str], cuts: tuple[int, ...] = (0, 5, 9)) -> store.Store:
  whole = store.from_documents(texts, T)
  bounds = [*whole.documents[list(cuts)].tolist(), len(whole)]
  shards = [whole.read(a, b) for a, b in itertools.pairwise(bounds)]
  return store.Store(shards, whole.documents, whole.sentences, whole.num_bytes, '')


@pytest.mark.parametrize('n', [0, 1, 7, 60, 1000])
@pytest.mark.parametrize('count', [0, 1, 3, 60])
def test_a_sample_has_the_middles_of_equal_parts(n, count):
  found = overlap.spread(n, count)
  assert len(found) == min(n, count)
  assert (found * len(found) // max(1, n) == np.arange(len(found))).all()  # one of each part
  assert (np.abs(found + found[::-1] - (n - 1)) <= 1).all()  # and no end is nearer than the other


def test_the_only_row_with_padding_is_no_more_than_it_is(parts, monkeypatch):
  examples = parts('clm').examples('train')
  monkeypatch.setattr(statistics, 'ROWS', len(examples) // 4)
  every = examples(np.arange(len(examples)), np.zeros(len(examples), np.int64))
  padding = lambda batch: (~statistics.is_text(batch)).mean()
  assert 0 < padding(every) * len(examples) < 1  # of the last row
  assert padding(statistics.sample(examples)) <= padding(every)


@pytest.mark.parametrize('name', MASKED)
def test_fates_are_those_of_a_loop(parts, name):
  examples = make(parts, name).examples('train')
  batch = statistics.sample(examples)
  assert len(batch['tokens']) == min(len(examples), statistics.ROWS)
  expected, uses = {}, collections.Counter()
  for r, tokens in enumerate(batch['tokens']):
    chosen = zip(batch['places'][r], batch['targets'][r], batch['weights'][r], strict=True)
    target_at = {place: target for place, target, weight in chosen if weight}
    for place, token in enumerate(tokens.tolist()):
      clean = target_at.get(place, token)
      if T.special[clean]:
        assert place not in target_at
        continue
      c = chr(clean - 5)
      uses[c] += 1
      kind = 'begins a word' if c.isalpha() and c.isascii() else 'part of a character'
      kind = 'punctuation' if c == '.' else 'white space' if c == ' ' else kind
      for key in ('all', kind):
        count = expected.setdefault(key, [0] * 5)
        count[0] += 1
        if place in target_at:
          count[1] += 1
          count[2 if token == T.mask else 4 if token == clean else 3] += 1
  found = statistics.fates(batch, T)
  halves = [found.pop(statistics.FREQUENT), found.pop(statistics.RARE)]
  assert {key: list(value) for key, value in found.items()} == expected
  assert [sum(x) for x in zip(*halves, strict=True)] == expected['all']
  most = itertools.accumulate(count for _, count in uses.most_common())
  assert halves[0].tokens == next(x for x in most if x >= expected['all'][0] / 2)


@pytest.mark.parametrize(
  ('text', 'kind'),
  [
    ('a', 'begins a word'),
    ('7', 'digits'),
    ('²', 'digits'),
    ('.', 'punctuation'),
    ('\n', 'white space'),
    ('\x1b', 'punctuation'),
    ('\ufffd', 'part of a character'),
  ],
)
def test_classes(text, kind):
  known = tokenizer.get('characters', [text])
  assert statistics.CLASSES[statistics.classes_of(np.array([5]), known)[0]] == kind
  assert statistics.CLASSES[statistics.classes_of(np.array([4]), known)[0]] == 'special'


@pytest.mark.parametrize('name', OBJECTIVES)
def test_text_that_no_row_holds(parts, name):
  made = make(parts, name)
  whole, examples = made.stores['train'], made.examples('train')
  held = np.zeros(len(whole), bool)
  for start, stop in examples.spans.tolist():
    held[start:stop] = True
  held[whole.documents[1:] - 1] = True
  lost = statistics.truncated(examples.spans, whole)
  assert lost == (~held).sum()
  assert (lost > 0) == (name in ('bert', 'albert', 'bert_packed'))


def test_spans_are_what_rows_hold(parts):
  for name in OBJECTIVES:
    made = make(parts, name)
    whole, examples = made.stores['train'], made.examples('train')
    count = np.arange(len(examples))
    batch = examples(count, np.zeros_like(count))
    tokens = batch['tokens'].copy()
    if 'places' in batch:
      rows, slots = np.nonzero(batch['weights'])
      tokens[rows, batch['places'][rows, slots]] = batch['targets'][rows, slots]
    of_rows = np.bincount(
      tokens[statistics.is_text(batch) & ~T.special[tokens]], minlength=T.vocab_size
    )
    of_spans = sum(
      np.bincount(whole.read(a, b), minlength=T.vocab_size) for a, b in examples.spans.tolist()
    )
    of_spans[T.special] = 0
    assert (of_rows == of_spans * made.config['objective'].get('dupe_factor', 1)).all(), name


def test_fertility_is_that_of_the_documents_looked_at(parts, monkeypatch):
  made = parts('clm')
  source, whole = made.sources['train'], made.stores['train']
  for most, chosen in ((1000, range(60)), (3, (10, 30, 50))):
    monkeypatch.setattr(statistics, 'DOCUMENTS', most)
    texts = [source[i] for i in chosen]
    words, tokens = (sum(map(len, x)) for x in (map(str.split, texts), map(str.encode, texts)))
    assert statistics.fertility(source, whole) == (len(texts), words, tokens)


def test_unknown():
  known = tokenizer.get('characters', ['ab'])
  assert statistics.unknown(store.from_documents(['abc', 'cc'], known), known) == 3 / 7
  assert statistics.unknown(store.from_documents(['ab'], known), known) == 0


@pytest.mark.parametrize('one_in', [1, 4])
def test_documents_that_are_there_before(one_in):
  rng = random.Random(0)
  texts = [rng.choice(['', 'a', 'b', 'ab', *documents(9)]) for _ in range(60)]
  found = overlap.documents(in_shards(texts), one_in)
  looked_at = [text for text in texts if len(text.encode()) in set(found.lengths.tolist())]
  assert '' not in looked_at
  assert found.lengths.tolist() == [len(text.encode()) for text in looked_at]
  expected = [text in looked_at[:i] for i, text in enumerate(looked_at)]
  assert found.repeated.tolist() == expected
  assert 0 < sum(expected) < len(expected)
  assert found.share == sum(found.lengths) / sum(len(text.encode()) for text in texts)
  assert (found.share == 1) == (one_in == 1)


@pytest.mark.parametrize('part', range(2, 9))
def test_a_sample_of_documents_keeps_to_the_budget(monkeypatch, part):
  whole = in_shards(documents(200))
  assert overlap.sampling(whole) == 1
  small(monkeypatch, BUDGET=len(whole) // part)
  one_in = overlap.sampling(whole)
  found = overlap.documents(whole, one_in)
  assert one_in > 1
  twice = overlap.documents(whole, one_in // 2).lengths
  assert twice.sum() + overlap.DOCUMENT * len(twice) > overlap.BUDGET
  assert 0 < found.lengths.sum() + overlap.DOCUMENT * len(found.lengths) <= overlap.BUDGET
  small(monkeypatch, BUDGET=0)  # no documents are too many
  assert not len(overlap.documents(whole, overlap.sampling(whole)).lengths)


@pytest.mark.parametrize('n', [1, 3, 8, 50])
@pytest.mark.parametrize('chunk', [16, 1 << 20])
def test_windows_are_those_of_a_loop(monkeypatch, n, chunk):
  small(monkeypatch, CHUNK=chunk, _TABLE=4)
  rng = random.Random(n)
  words = lambda count, letters: ''.join(rng.choices(letters, k=count))
  texts = [words(rng.randrange(30), 'abc') for _ in range(20)]
  copied = words(20, 'ax') + ''.join(texts[6])[:-1] + words(9, 'abx')
  others = {
    'some': store.from_documents([*texts[3:6], copied, words(70, 'abcx')], T),
    'none': store.from_documents([words(99, 'yz')], T),
    'all': store.from_documents(texts, T),
    'short': store.from_documents(['q'], T),
  }
  train = in_shards(texts)
  list_of = lambda x: x.read(0, len(x)).tolist()
  every = lambda x: [tuple(x[i : i + n]) for i in range(len(x) - n + 1)]
  known, expected = set(every(list_of(train))), {}
  for name, other in others.items():
    covered = np.zeros(len(other), bool)
    for i, window in enumerate(every(list_of(other))):
      covered[i : i + n] |= window in known
    expected[name] = covered.mean()
  assert overlap.windows(train, others, n) == expected
  for name, other in others.items():  # alone, most of what train holds is not looked for
    assert overlap.windows(train, {name: other}, n) == {name: expected[name]}
  assert expected['all'] == 1
  assert n == 1 or (expected['none'] == 0 and expected['some'] < 1)


def test_windows_of_a_sample(monkeypatch):
  texts = documents(40)
  train, other = in_shards(texts), store.from_documents(texts[:20], T)
  small(monkeypatch, CHUNK=64, EVALUATED=640)
  assert len(other) > 640 >= sum(map(len, overlap._evaluated(other))) > 576
  assert overlap.windows(train, {'x': other}, 20) == {'x': 1}
  small(monkeypatch, BUDGET=len(train) // 2)
  assert 0.3 < overlap.windows(train, {'x': other}, 20)['x'] < 1


def test_no_other_store():
  assert overlap.windows(in_shards(documents(12)), {}, 5) == {}


@pytest.mark.parametrize('name', OBJECTIVES)
def test_tables(parts, name):
  made = make(parts, name)
  config = made.config['objective']
  asked = {key: config[key] for key in statistics.ASKED if key in config}
  arguments = made.tokenizer, made.sources, made.stores, made.examples('train'), asked
  tables = statistics.tables(*arguments)
  assert all(len(line) == len(table.head) for table in tables for line in table.lines)
  shown = [line for table in tables for line in show.table_on_terminal(table, 80, colour=False)]
  assert max(map(len, shown)) <= 80
  rows, *fates, text, twice = tables
  assert len(fates) == (OBJECTIVES[name][0] == 'mlm')
  assert ('pair targets' in dict(rows.lines)) == (name in ('bert', 'albert', 'bert_packed'))
  assert [line[0] for line in text.lines] == ['train', 'valid']
  assert twice.lines[0] == ('train, earlier in itself', '0 %', '0 %', '–')


def test_what_is_there_twice():
  train, valid = ['abc', 'd', 'abc', 'abc'], ['ef', 'd', 'ef', 'ef', 'g']
  stores = {'train': store.from_documents(train, T), 'valid': store.from_documents(valid, T)}
  assert [line[:3] for line in statistics._twice(stores).lines] == [
    ('train, earlier in itself', '50.0 %', '60.0 %'),
    ('valid, earlier in itself', '40.0 %', '50.0 %'),
    ('valid, in train', '20.0 %', '12.5 %'),
  ]


def test_parts_that_were_looked_at_are_said(parts, monkeypatch):
  made = parts('clm')
  made.examples('train')
  small(monkeypatch, BUDGET=2048, CHUNK=64)
  small(monkeypatch, EVALUATED=640)
  note = statistics._twice(made.stores).note
  assert 'Of larger sets 640 tokens' in note
  assert 'in 2,048 tokens' in statistics._text(made.tokenizer, made.sources, made.stores).note
  assert 'lengths were compared' in note
  assert 'was read for windows: their share is at least this' in note


@pytest.mark.parametrize(
  ('share', 'text'), [(0, '0 %'), (1, '100.0 %'), (0.1234, '12.3 %'), (0.00012, '0.012 %')]
)
def test_percent(share, text):
  assert statistics.percent(share) == text
