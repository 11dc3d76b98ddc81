"""Rows are made of the store's tokens, in order, with nothing lost; pairs follow BERT's recipe."""

import numpy as np
import pytest

from lmjax.data import pack, store, tokenizer
from tests.conftest import documents

BYTES = tokenizer.get('bytes', ())
STORE = store.from_documents(documents(40), BYTES)
MANY = store.from_documents(documents(400, seed=2), BYTES)


def tokens(a: int, b: int) -> list[int]:
  return STORE.read(a, b).tolist()


def test_windows_are_the_stream_and_say_what_is_outside():
  n = len(STORE)
  got, real = pack.windows(STORE, np.array([-3, 10, n - 2]), 5, pad=0)
  assert got[0].tolist() == [0, 0, 0, *tokens(0, 2)]
  assert got[1].tolist() == tokens(10, 15)
  assert got[2].tolist() == [*tokens(n - 2, n), 0, 0, 0]
  assert real.tolist() == [[0, 0, 0, 1, 1], [1] * 5, [1, 1, 0, 0, 0]]


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
  longest = np.diff([*STORE.sentences, len(STORE)]).max()
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
