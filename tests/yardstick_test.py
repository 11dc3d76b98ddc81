"""The yardstick asks models of all objectives for the same tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lmjax import sharding, yardstick
from lmjax.errors import UserError
from lmjax.evaluate import Evaluator

WINDOWS = 5
OBJECTIVES = {
  'gpt': ('clm', {}),
  'gpt, documents apart': ('clm', {'objective.separate_documents': True}),
  'bert': ('mlm', {}),
  'bert, documents apart': ('mlm', {'objective.separate_documents': True}),
  'bert with pairs': ('mlm', {'objective.next_sentence': True}),
}


@pytest.fixture(scope='module')
def made(parts):
  overrides = {'evaluate.yardstick': WINDOWS, 'length': 64, 'batch': 8}
  return {
    name: parts(objective, **own, **overrides) for name, (objective, own) in OBJECTIVES.items()
  }


def every(rows) -> dict[str, np.ndarray]:
  indices = np.arange(len(rows))
  return rows(indices, np.zeros_like(indices))


def asked(batch, weights: str) -> list[list[int]]:
  """The tokens that are asked for, window for window."""
  named = zip(batch['targets'], batch[weights], strict=True)
  found = [targets[weight > 0].tolist() for targets, weight in named]
  return [x for x in found if x]


@pytest.mark.parametrize('name', OBJECTIVES)
def test_all_are_asked_for_the_same_tokens(made, name):
  reference, batch = (every(yardstick.rows(made[key])) for key in ('gpt', name))
  masked = asked(batch, 'masked_weights')
  assert masked == asked(reference, 'masked_weights')
  assert len(masked) == WINDOWS
  tokens = [token for window in asked(batch, 'every_weights') for token in window]
  assert tokens == [token for window in asked(reference, 'every_weights') for token in window]
  share = sum(map(len, masked)) / len(tokens)
  assert abs(share - 0.15) < 0.02


@pytest.mark.parametrize('name', [name for name in OBJECTIVES if name.startswith('bert')])
def test_a_masked_model_sees_all_but_what_it_is_asked_for(made, name):
  rows = yardstick.rows(made[name])
  batch, mask = every(rows), made[name].tokenizer.mask
  weights = batch['masked_weights'] + batch['every_weights']
  np.testing.assert_array_equal(batch['tokens'] == mask, weights > 0)
  inside = (slice(None), slice(1, -1))
  clean = np.where(weights > 0, batch['targets'], batch['tokens'])[inside]
  np.testing.assert_array_equal(clean, np.repeat(rows.windows[:, 1:], 1 + rows.width, axis=0))


def test_a_causal_model_sees_what_stands_before(made):
  rows = yardstick.rows(made['gpt'])
  batch = every(rows)
  np.testing.assert_array_equal(batch['tokens'][:, 1:], batch['targets'][:, :-1])
  np.testing.assert_array_equal(batch['tokens'], rows.windows[:, :-1])


def params(parts):
  init = lambda key, batch: nn.unbox(parts.init_params(key, batch))
  batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parts.abstract_batch())
  fresh = jax.jit(init)(jax.random.key(0), batch)
  return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('name', ['gpt', 'bert'])
def test_the_numbers_are_those_of_the_logits(made, name, devices):
  """Row by row, in NumPy, from the distributions that the model gives."""
  parts, weights = made[name], params(made[name])
  mesh = sharding.make_mesh(parts.config['sharding'], jax.devices()[:devices])
  with jax.set_mesh(mesh), sharding.logical_axes('replicate'):
    values = Evaluator(parts, mesh)(weights)
  batch = every(yardstick.rows(parts))
  logits = parts.model.apply({'params': weights}, batch['tokens'], method='logits')
  logits = np.asarray(logits, np.float64)
  chances = np.exp(logits - logits.max(axis=-1, keepdims=True))
  chances /= chances.sum(axis=-1, keepdims=True)
  nats = -np.log(np.take_along_axis(chances, batch['targets'][..., None], axis=-1)[..., 0])
  mean = lambda x, kind: (x * batch[kind]).sum() / batch[kind].sum()
  expected = {
    'masked_xent': mean(nats, 'masked_weights'),
    'masked_accuracy': mean(logits.argmax(axis=-1) == batch['targets'], 'masked_weights'),
    'pseudo_xent': mean(nats, 'every_weights'),
  }
  store = parts.stores['valid']
  expected['pseudo_bits_per_byte'] = (
    expected['pseudo_xent'] / math.log(2) * len(store) / store.num_bytes
  )
  found = {key.rpartition('/')[2]: x for key, x in values.items() if 'yardstick' in key}
  assert found.keys() == expected.keys()
  for key, x in expected.items():
    assert found[key] == pytest.approx(x, rel=2e-5), key
  assert found['masked_xent'] > 1.1 * math.log(parts.vocab_size)  # wide ones are not near chance


MISTAKES = {
  'short rows': ({'length': 48}, 'needs length = 64 or more'),
  'too many windows': ({'evaluate.yardstick': 10**6}, 'the set valid is too short'),
  'no set': ({'data.eval': {}}, 'needs an evaluation set'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes(parts, name):
  overrides, said = MISTAKES[name]
  with pytest.raises(UserError, match=said):
    yardstick.rows(parts('clm', **{'evaluate.yardstick': 4, 'length': 64} | overrides))
