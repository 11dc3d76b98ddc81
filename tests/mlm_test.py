"""Rows of masked language modelling: what is hidden, and what halves and labels say."""

import itertools

import numpy as np
import pytest

from tests.contract_test import OBJECTIVES, make

MASKED = [name for name in OBJECTIVES if not name.startswith('clm')]
PAIRED = ['bert', 'albert', 'bert_packed']


def rows(experiment, epoch: int = 0):
  """(all rows of an epoch, the same as they were before anything was hidden)."""
  examples = experiment.examples('train')
  indices = np.arange(len(examples))
  batch = examples(indices, np.full_like(indices, epoch))
  clean = batch['tokens'].copy()
  row, slot = np.nonzero(batch['weights'])
  clean[row, batch['places'][row, slot]] = batch['targets'][row, slot]
  return batch, clean


@pytest.mark.parametrize('name', MASKED)
def test_what_is_hidden_is_ordinary_text_and_as_much_as_was_asked(parts, name):
  experiment = make(parts, name)
  t, o = experiment.tokenizer, experiment.objective
  batch, clean = rows(experiment)
  assert not (clean == t.mask).any()
  assert not t.special[batch['targets'][batch['weights'] > 0]].any()
  ordinary, chosen = (~t.special[clean]).sum(axis=1), batch['weights'].sum(axis=1)
  # Whole words and spans stop short of the number.
  assert (chosen <= np.maximum(1, np.rint(o.rate * ordinary))).all()
  if o.masking == 'token':
    assert (chosen == np.clip(np.rint(o.rate * ordinary), 1, batch['places'].shape[1])).all()


@pytest.mark.parametrize('name', MASKED)
def test_masks_are_drawn_anew_in_every_epoch_unless_they_are_static(parts, name):
  experiment = make(parts, name)
  (batch, clean), (other, same) = rows(experiment), rows(experiment, epoch=1)
  assert np.array_equal(clean, same)
  differ = (batch['tokens'] != other['tokens']).any(axis=1).mean()
  assert differ > 0.9 if experiment.objective.dynamic else differ == 0


@pytest.mark.parametrize('name', PAIRED)
def test_a_pair_is_cls_a_sep_b_sep_and_its_label_says_what_b_is(parts, name):
  experiment = make(parts, name)
  t, examples = experiment.tokenizer, experiment.examples('train')
  store = experiment.stores['train']
  documents = [spelt(store.read(*span)) for span in itertools.pairwise(store.documents.tolist())]
  batch, clean = rows(experiment)
  labels, negatives = [], 0
  for row, slot in np.argwhere(batch['pair_weights'] > 0):
    place, label = batch['pair_places'][row, slot], batch['pair_targets'][row, slot]
    mine = batch['segments'][row] == slot + 1
    (at,) = np.nonzero(mine)
    assert at[0] == place
    assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
    tokens, types = clean[row, mine], batch['types'][row, mine]
    first, last = np.flatnonzero(tokens == t.sep)
    assert tokens[0] == t.cls
    assert last == len(tokens) - 1
    assert np.array_equal(types, np.arange(len(tokens)) > first)
    if 'positions' in batch:
      assert np.array_equal(batch['positions'][row, mine], np.arange(len(tokens)))
    a, b = spelt(tokens[1:first]), spelt(tokens[first + 1 : last])
    a, b = (b, a) if experiment.objective.sentence_order and label else (a, b)
    # Both may have lost tokens at their ends; short ones stand in many documents.
    together = any(-1 < text.find(a) < text.rfind(b) for text in documents)
    if label == 0 or experiment.objective.sentence_order:
      assert together
    elif min(len(a), len(b)) > 15:
      assert not together
      negatives += 1
    labels.append(label)
  assert experiment.objective.sentence_order or negatives > 5
  assert 0.2 < np.mean(labels) < 0.9
  assert not clean[batch['segments'] == 0].any()  # [PAD] is 0
  assert len(labels) == len(examples.pairs)


def spelt(tokens: np.ndarray) -> str:
  return ''.join(map(chr, tokens))
