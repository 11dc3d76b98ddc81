"""Generation with a cache is generation without one; sampling does what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lmjax import generate
from lmjax.errors import UserError
from lmjax.models.positions import POSITIONS


def model_and_params(parts, **overrides):
  experiment = parts('clm', **{'model.initializer': 'fan_in', **overrides})
  batch = {k: jnp.ones(v.shape, v.dtype) for k, v in experiment.abstract_batch().items()}
  params = jax.jit(lambda b: nn.unbox(experiment.init_params(jax.random.key(0), b)))(batch)
  return experiment, jax.tree.map(lambda p: 3 * p, params)


VARIANTS = [
  *({'model.positions': name} for name in POSITIONS),
  {'model.kv_heads': 1, 'model.qk_norm': True, 'model.positions': 'rotary'},
  {'model.window': 4, 'model.norm_position': 'both', 'model.scan': False},
]


@pytest.mark.parametrize('overrides', VARIANTS, ids=str)
def test_greedy_with_a_cache_is_greedy_without(parts, overrides):
  experiment, params = model_and_params(parts, **overrides)
  model, new = experiment.model, 12
  prompt = np.random.default_rng(0).integers(5, 261, (2, 7)).astype(np.int32)
  got = generate.continue_tokens(model, params, prompt, jax.random.key(0), new, temperature=0)
  logits = jax.jit(lambda tokens: model.apply({'params': params}, tokens, method='logits'))
  tokens = jnp.concatenate([prompt, jnp.zeros((2, new), jnp.int32)], axis=1)
  for place in range(7, 7 + new):  # what lies after is not seen
    tokens = tokens.at[:, place].set(logits(tokens)[:, place - 1].argmax(axis=-1))
  np.testing.assert_array_equal(got, tokens[:, 7:])
  assert len(np.unique(got)) > 2


def test_a_run_with_a_kernel_generates_without_it(parts):
  """Kernels have no cache, and need not be those of the devices that generate."""
  plain, params = model_and_params(parts)
  experiment = parts('clm', **{'model.attention': 'splash'})
  prompt = np.full((1, 5), 7, np.int32)
  got, expected = (
    generate.continue_tokens(e.model, params, prompt, jax.random.key(0), 4, temperature=0)
    for e in (experiment, plain)
  )
  np.testing.assert_array_equal(got, expected)


LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.06, 0.04]]))


def draws(**kwargs) -> np.ndarray:
  settings = dict(temperature=1.0, top_k=0, top_p=1.0) | kwargs
  many = jnp.broadcast_to(LOGITS, (4000, 5))
  got = generate.choose(many, jax.random.key(0), **settings)
  return np.bincount(got, minlength=5) / 4000


def test_sampling():
  np.testing.assert_allclose(draws(), np.exp(LOGITS[0]), atol=0.03)
  np.testing.assert_allclose(draws(temperature=0), [1, 0, 0, 0, 0])
  np.testing.assert_allclose(draws(top_k=2), [4 / 7, 3 / 7, 0, 0, 0], atol=0.03)
  np.testing.assert_allclose(draws(top_p=0.69), [4 / 7, 3 / 7, 0, 0, 0], atol=0.03)
  np.testing.assert_allclose(draws(top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0, 0], atol=0.03)
  np.testing.assert_allclose(draws(top_p=1e-6), [1, 0, 0, 0, 0])
  hot = np.exp(LOGITS[0] / 2)
  np.testing.assert_allclose(draws(temperature=2.0), hot / hot.sum(), atol=0.03)


def test_text_is_seeded_and_continues_the_prompt(parts):
  experiment, params = model_and_params(parts)
  text = lambda seed: generate.continue_text(experiment, params, 'The river', 20, seed=seed)
  assert text(1).startswith('The river')
  assert text(1) == text(1)
  assert text(1) != text(2)


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    (dict(max_tokens=0), 'max_tokens = 0'),
    (dict(temperature=-1.0), 'temperature = -1'),
    (dict(temperature=float('nan')), 'temperature = nan'),
    (dict(top_k=-1), 'top_k = -1'),
    (dict(top_p=0.0), 'top_p = 0'),
    (dict(top_p=1.5), 'top_p = 1.5'),
    (dict(max_tokens=100), 'exceed the 48 positions'),
  ],
)
def test_mistakes(parts, settings, said):
  experiment, params = model_and_params(parts)
  with pytest.raises(UserError, match=said):
    generate.continue_text(experiment, params, 'The', **settings)


def test_only_causal_models_continue_a_text(parts):
  with pytest.raises(UserError, match='only a causal model'):
    generate.continue_text(parts('mlm'), None, 'The')
