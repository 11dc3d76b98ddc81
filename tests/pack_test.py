"""Rows are made of the store's tokens, in order, with nothing lost; pairs follow BERT's recipe."""

import itertools

import numpy as np
import pytest

from lmjax import objectives
from lmjax.data import pack, store, tokenizer
from tests.conftest import documents

BYTES = tokenizer.get('bytes', ())
STORE = store.from_documents(documents(40), BYTES)
MANY = store.from_documents(documents(400, seed=2), BYTES)


def tokens(a: int, b: int) -> list[int]:
  return STORE.read(a, b).tolist()


def test_windows_are_the_stream_closed_to_a_ring():
  n = len(STORE)
  got = pack.windows(STORE, np.array([10, n - 2, n + 4]), 5)
  assert got[0].tolist() == tokens(10, 15)
  assert got[1].tolist() == [*tokens(n - 2, n), *tokens(0, 3)]
  assert got[2].tolist() == tokens(4, 9)
  longer = pack.windows(STORE, np.array([n - 1]), 2 * n)
  assert longer[0].tolist() == [*tokens(n - 1, n), *tokens(0, n), *tokens(0, n - 1)]


@pytest.mark.parametrize(('length', 'short_by'), [(40, 0), (40, 1), (40, 39), (10**5, 0)])
@pytest.mark.parametrize('train', [True, False])
def test_every_token_is_a_target_once_an_epoch(length, short_by, train):
  """However the corpus divides into windows; in evaluation nothing predicts the first token."""
  n = len(STORE) // 40 * 40 - short_by
  ring = store.Store([STORE.read(0, n)], np.array([0, n]), np.array([0]), n, '')
  rows = objectives.get('clm').examples(ring, BYTES, length, seed=0, train=train)
  for epoch in (0, 1):
    batch = rows(np.arange(len(rows)), np.full(len(rows), epoch))
    real = batch['weights'] > 0
    assert real.any(axis=1).all()
    pairs = zip(batch['tokens'][real], batch['targets'][real], strict=True)
    tokens = ring.read(0, n).tolist()
    expected = list(itertools.pairwise([*tokens, tokens[0]] if train else tokens))
    assert sorted(pairs) == sorted(expected)
    assert (batch['targets'][~real] == BYTES.pad).all()


def test_cuts_between_windows_move_from_epoch_to_epoch():
  rows = objectives.get('clm').examples(STORE, BYTES, 40, seed=0)
  first, second = (rows(np.array([0]), np.array([epoch]))['tokens'] for epoch in (0, 1))
  assert not np.array_equal(first, second)


def test_segments_open_with_the_end_of_text_and_restart_positions():
  eos = 9
  rows = np.array([[1, 2, eos, 4, 5, eos], [eos, 1, 2, 3, 0, 0]])
  real = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
  segments, positions = pack.document_segments(rows, real, eos)
  assert segments.tolist() == [[1, 1, 2, 2, 2, 3], [2, 2, 2, 2, 0, 0]]
  assert positions.tolist()[0] == [0, 1, 0, 1, 2, 0]
  assert positions.tolist()[1][:4] == [0, 1, 2, 3]


@pytest.mark.parametrize('capacity', [7, 20, 64, 300, 10**6])
def test_sentence_windows_lose_nothing_and_cut_only_what_is_too_long(capacity):
  bounds = pack.sentence_windows(STORE, capacity)
  assert bounds[0] == 0
  assert bounds[-1] == len(STORE)
  sizes = np.diff(bounds)
  assert sizes.min() > 0
  assert sizes.max() <= capacity
  starts = set(STORE.sentences.tolist())
  lengths = np.diff([*STORE.sentences, len(STORE)])
  longest = lengths.max()
  # A row that is not full ends where a sentence begins that some row can hold.
  begins = bounds[1:-1][sizes[:-1] < capacity]
  assert (lengths[np.searchsorted(STORE.sentences, begins)] <= capacity).all()
  if capacity >= longest:
    assert set(bounds[:-1].tolist()) <= starts
    # Greedy: the next sentence would not have fitted.
    ends = np.append(STORE.sentences, len(STORE))
    following = ends[np.searchsorted(ends, bounds[1:-1], side='right')]
    assert ((following - bounds[:-2]) > capacity).all()


def pairs(capacity=60, **kwargs):
  defaults = dict(seed=0, short_prob=0.1, copies=1, ordered=False)
  return pack.sentence_pairs(MANY, capacity, **{**defaults, **kwargs})


def document_of(places: np.ndarray) -> np.ndarray:
  return np.searchsorted(MANY.documents, places, side='right') - 1


def test_pairs_fit_and_halves_are_not_empty():
  a0, a1, b0, b1, label = pairs().T
  assert (a1 - a0 + b1 - b0).max() <= 60
  assert (a1 - a0).min() > 0
  assert (b1 - b0).min() > 0
  assert set(label) == {0, 1}


def test_negatives_come_from_another_document_and_positives_follow():
  a0, a1, b0, _, label = pairs(capacity=10**6).T
  other = document_of(a0) != document_of(b0)
  np.testing.assert_array_equal(other, label == 1)
  assert (b0[label == 0] == a1[label == 0]).all()


def test_no_end_of_text_is_inside_a_pair():
  for a0, a1, b0, b1, _ in pairs(capacity=200).tolist():
    assert BYTES.eos not in MANY.read(a0, a1)
    assert BYTES.eos not in MANY.read(b0, b1)


def test_first_halves_and_true_followers_cover_the_corpus_once():
  """Unused sentences are gathered again: with no truncation nothing is lost, nothing is doubled."""
  a0, a1, b0, b1, label = pairs(capacity=10**6).T
  covered = np.zeros(len(MANY), int)
  for start, stop in [*zip(a0, a1, strict=True), *zip(b0[label == 0], b1[label == 0], strict=True)]:
    covered[start:stop] += 1
  ends = MANY.documents[1:] - 1
  assert (np.delete(covered, ends) == 1).all()
  assert (covered[ends] == 0).all()


def test_copies_differ_and_seeds_reproduce():
  one, two = pairs(), pairs(copies=2)
  np.testing.assert_array_equal(one, two[: len(one)])
  assert len(two) > 1.8 * len(one)
  assert not np.array_equal(two[: len(one)], two[len(one) : 2 * len(one)])
  np.testing.assert_array_equal(two, pairs(copies=2))
  assert not np.array_equal(one, pairs(seed=1))


def test_sentence_order_swaps_half_of_what_is_consecutive():
  a0, a1, b0, b1, label = pairs(capacity=10**6, ordered=True).T
  first, second = np.where(label == 0, a1, b1), np.where(label == 0, b0, a0)
  assert (first == second).all()
  assert 0.4 < label.mean() < 0.6
  assert (document_of(a0) == document_of(b0)).all()


def test_short_rows_are_the_share_asked_for():
  sizes = {
    share: np.mean([np.ptp(p[:2]) + np.ptp(p[2:4]) for p in pairs(150, short_prob=share)])
    for share in (0.0, 0.5, 1.0)
  }
  assert sizes[1.0] < 0.75 * sizes[0.0]
  assert sizes[1.0] < sizes[0.5] < sizes[0.0]


def test_truncation_takes_from_the_longer_half_at_both_ends():
  rng = np.random.default_rng(0)
  fronts = []
  for _ in range(200):
    a, b = [0, 30], [100, 110]
    pack._truncate(a, b, 24, rng)
    assert a[1] - a[0] == 14
    assert b == [100, 110]
    fronts.append(a[0])
  assert 7 < np.mean(fronts) < 9  # half of the 16


@pytest.mark.parametrize('slots', [1, 2, 5])
def test_rows_hold_every_item_once_and_fit(slots):
  lengths = np.random.default_rng(0).integers(5, 50, 500)
  rows = pack.pack_rows(lengths, 100, slots)
  items = rows[rows >= 0]
  assert sorted(items.tolist()) == list(range(500))
  assert all(lengths[row[row >= 0]].sum() <= 100 for row in rows)
  assert rows.shape[1] == slots
  if slots == 5:
    assert lengths.sum() / (len(rows) * 100) > 0.9  # first-come rows would reach 0.8
