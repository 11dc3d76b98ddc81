"""batch(step) is a function of the step; every example comes once an epoch."""

import time

import numpy as np
import pytest

from lmjax.data import corrupt, loader


class Numbers:
  """Examples that say what they are."""

  def __init__(self, n: int):
    self.n = n

  def __len__(self) -> int:
    return self.n

  def __call__(self, indices, epochs):
    return {'index': indices.copy(), 'epoch': epochs, 'weights': np.ones(len(indices), np.float32)}


@pytest.mark.parametrize('n', [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permutation_is_one(n):
  seeds = np.full(n, 5, np.uint64)
  got = loader.permute(np.arange(n), n, seeds)
  assert sorted(got.tolist()) == list(range(n))


def test_permutation_leaves_no_order():
  n = 10_000
  got = loader.permute(np.arange(n), n, np.zeros(n, np.uint64))
  assert abs(np.corrcoef(got, np.arange(n))[0, 1]) < 0.04
  assert abs(np.corrcoef(got[1:], got[:-1])[0, 1]) < 0.04
  assert (np.diff(got) == 1).sum() < 10


@pytest.mark.parametrize('batch', [1, 4, 7, 30])
def test_every_example_once_an_epoch(batch):
  n, epochs = 21, 4
  data = loader.Loader(Numbers(n), batch, seed=3)
  steps = -(-n * epochs // batch)
  rows = [data.batch(step) for step in range(steps)]
  index = np.concatenate([r['index'] for r in rows])[: n * epochs].reshape(epochs, n)
  epoch = np.concatenate([r['epoch'] for r in rows])[: n * epochs].reshape(epochs, n)
  for e in range(epochs):
    assert sorted(index[e].tolist()) == list(range(n))
    assert (epoch[e] == e).all()
  assert not np.array_equal(index[0], index[1])


def test_batches_do_not_depend_on_what_was_read_before():
  data = loader.Loader(Numbers(50), 8, seed=1)
  forwards = [data.batch(step)['index'].tolist() for step in range(12)]
  backwards = [data.batch(step)['index'].tolist() for step in reversed(range(12))]
  assert forwards == backwards[::-1]
  assert forwards != [
    loader.Loader(Numbers(50), 8, 2).batch(s)['index'].tolist() for s in range(12)
  ]


def test_a_process_makes_only_its_rows_of_the_same_batch():
  rows = loader.Rows(np.array([1, 2, 6]), np.ones(3, bool))
  for step in range(9):
    whole = loader.Loader(Numbers(21), 8, seed=1).batch(step)
    share = loader.Loader(Numbers(21), 8, seed=1, rows=rows).batch(step)
    for name, value in whole.items():
      np.testing.assert_array_equal(share[name], value[rows.numbers])
  batches = [loader.eval_batches(Numbers(21), 8, rows=r) for r in (None, rows)]
  for whole, share in zip(*batches, strict=True):
    for name, value in whole.items():
      np.testing.assert_array_equal(share[name], value[rows.numbers])


@pytest.mark.parametrize(('n', 'batch'), [(5, 4), (8, 4), (3, 8)])
def test_evaluation_counts_every_example_once(n, batch):
  seen = []
  for rows in loader.eval_batches(Numbers(n), batch):
    assert len(rows['index']) == batch
    seen += rows['index'][rows['weights'] > 0].tolist()
  assert seen == list(range(n))
  assert len(list(loader.eval_batches(Numbers(n), batch, limit=1))) == 1


def test_fingerprint_adds_up_over_hosts_and_notices_everything():
  rng = np.random.default_rng(0)
  batch = {'a': rng.integers(0, 9, (8, 5)), 'b': rng.random((8, 3)).astype(np.float32)}
  whole = loader.fingerprint(batch)
  # Of two processes, which both make row 3, the first counts it.
  shares = [([0, 1, 3], [1, 1, 1]), ([2, 3, 4, 5, 6, 7], [1, 0, 1, 1, 1, 1])]
  rows = [loader.Rows(np.array(numbers), np.array(counted) > 0) for numbers, counted in shares]
  parts = [loader.fingerprint({k: v[r.numbers] for k, v in batch.items()}, r) for r in rows]
  assert sum(parts) % (1 << 64) == whole
  for key in batch:
    other = {k: v.copy() for k, v in batch.items()}
    other[key][3, 2] += 1
    assert loader.fingerprint(other) != whole
  swapped = {k: v[[1, 0, *range(2, 8)]] for k, v in batch.items()}
  assert loader.fingerprint(swapped) != whole


def test_prefetch_runs_ahead_keeps_order_and_passes_errors_on():
  def make(step):
    if step == 5:
      raise KeyError('five')
    return step

  batches = loader.prefetch(make, 0, 10)
  assert [next(batches) for _ in range(5)] == [0, 1, 2, 3, 4]
  with pytest.raises(KeyError, match='five'):
    next(batches)


def test_prefetch_ends_its_thread_when_left():
  made = []
  batches = loader.prefetch(lambda step: made.append(step) or step, 0, 10**9)
  assert next(batches) == 0
  batches.close()
  count = len(made)
  time.sleep(0.3)
  assert len(made) == count


def test_keys_differ_in_every_part():
  places = np.arange(100)
  a = corrupt.keys(0, places, places * 0)
  b = corrupt.keys(0, places, places * 0 + 1)
  c = corrupt.keys(1, places, places * 0)
  assert len({*a.tolist(), *b.tolist(), *c.tolist()}) == 300


def test_places_are_exact_where_32_bits_are_too_few():
  """The tokens of a run are more than its steps: the 2^40th batch is as good as the first."""
  asked = []

  class Examples:
    def __len__(self):
      return 7

    def __call__(self, indices, epochs):
      asked.append((indices.tolist(), epochs.tolist()))
      return {'tokens': indices}

  step = (1 << 40) + 3
  loader.Loader(Examples(), 21, seed=0).batch(step)
  ((indices, epochs),) = asked
  assert epochs == [(step * 21 + row) // 7 for row in range(21)]
  for epoch in range(3):
    assert sorted(indices[7 * epoch : 7 * epoch + 7]) == list(range(7))
