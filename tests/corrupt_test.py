"""Masks have the rates they should have, and depend on their keys alone."""

import numpy as np
import pytest

from lmjax.data import corrupt

B, L = 64, 128


def keys(seed=0, epoch=0):
  return corrupt.keys(seed, np.arange(B), np.full(B, epoch))


def candidates():
  real = np.ones((B, L), bool)
  real[:, 0] = False
  real[: B // 2, 100:] = False
  return real


def starts():
  return np.random.default_rng(0).random((B, L)) < 0.6


CHOOSE = {
  'token': lambda c, n, k: corrupt.choose_tokens(c, n, k),
  'word': lambda c, n, k: corrupt.choose_words(c, n, starts(), k),
  'span': lambda c, n, k: corrupt.choose_spans(c, n, starts(), k),
}
every_masking = pytest.mark.parametrize('masking', CHOOSE)


@every_masking
def test_only_candidates_are_chosen_and_never_too_many(masking):
  counts = np.where(np.arange(B) % 2, 15, 19)
  chosen = CHOOSE[masking](candidates(), counts, keys())
  assert not (chosen & ~candidates()).any()
  got = chosen.sum(axis=1)
  assert (got <= counts).all()
  # Whole words may leave a place or two of the count empty.
  assert (got == counts).all() if masking == 'token' else (got >= counts - 3).mean() > 0.9


@every_masking
def test_choice_depends_on_seed_example_and_epoch_alone(masking):
  counts = np.full(B, 15)
  choose = lambda *args: CHOOSE[masking](candidates(), counts, keys(*args))
  np.testing.assert_array_equal(choose(0, 0), choose(0, 0))
  assert not np.array_equal(choose(0, 0), choose(1, 0))
  assert not np.array_equal(choose(0, 0), choose(0, 1))
  rows = choose(0, 0)
  assert len({row.tobytes() for row in rows}) == B


def test_tokens_are_chosen_alike():
  """Each candidate is chosen with the same probability: chi-squared over places."""
  real = np.ones((B, L), bool)
  total = np.zeros(L)
  for epoch in range(200):
    total += corrupt.choose_tokens(real, np.full(B, 16), keys(epoch=epoch)).sum(axis=0)
  expected = 200 * B * 16 / L
  chi2 = ((total - expected) ** 2 / expected).sum() / (1 - 16 / L)
  assert 80 < chi2 < 185  # 127 degrees of freedom, five deviations


def test_words_are_taken_whole():
  counts, begins = np.full(B, 15), starts()
  chosen = corrupt.choose_words(candidates(), counts, begins, keys())
  for row in range(B):
    places = np.flatnonzero(candidates()[row])
    word = np.cumsum(begins[row, places] | (np.arange(len(places)) == 0))
    picked = chosen[row, places]
    assert all(picked[word == w].all() or not picked[word == w].any() for w in np.unique(word))


def test_spans_are_longer_than_words():
  counts = np.full(B, 15)
  runs = {}
  for masking in ('token', 'word', 'span'):
    chosen = CHOOSE[masking](candidates(), counts, keys())
    runs[masking] = chosen.sum() / (np.diff(chosen.astype(int), axis=1, prepend=0) == 1).sum()
  assert runs['token'] < runs['word'] < runs['span']
  assert runs['span'] > 2.5


def test_places_are_in_order_and_padded():
  chosen = np.zeros((2, 6), bool)
  chosen[0, [4, 1]] = True
  places, weights = corrupt.gather_places(chosen, 3)
  assert places.tolist() == [[1, 4, 0], [0, 0, 0]]
  assert weights.tolist() == [[1, 1, 0], [0, 0, 0]]
  assert corrupt.gather_places(chosen, 8)[0].shape == (2, 8)


def test_replacement_shares():
  tokens = np.full((B * 20, L), 7, np.int32)
  chosen = np.random.default_rng(0).random(tokens.shape) < 0.3
  chosen[:, 0] |= np.arange(len(tokens)) % 2 == 0  # the first place is no exception
  ordinary = np.arange(10, 1000)
  noise = corrupt.keys(0, np.arange(len(tokens)), np.zeros(len(tokens), int))
  got = corrupt.replace(tokens, chosen, 3, ordinary, (0.8, 0.1), noise)
  assert (got[~chosen] == 7).all()
  new = got[chosen]
  assert (new == 3).mean() == pytest.approx(0.8, abs=0.01)
  assert (new == 7).mean() == pytest.approx(0.1, abs=0.01)
  random = new[(new != 3) & (new != 7)]
  assert set(random) <= set(ordinary)
  assert len(set(random)) > 900
  assert (tokens == 7).all()


def test_bits_are_uniform_and_streams_differ():
  noise = keys()
  a, b = corrupt.bits(noise, 4096, 1), corrupt.bits(noise, 4096, 2)
  assert not (a == b).any()
  for bit in range(32):
    assert ((a >> np.uint32(bit)) & 1).mean() == pytest.approx(0.5, abs=0.005)
