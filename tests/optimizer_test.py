"""Schedules by hand values, optimizers against NumPy, masks and Muon's shapes from axis names."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.errors import UserError
from lmjax.optimizer import Optimizer, averaged, shardings

AXES = {
  'embedding': ('vocab', 'embed'),
  'query': ('layers', 'embed', 'heads', 'kv'),
  'query_bias': ('layers', 'heads', 'kv'),
  'out': ('layers', 'heads', 'kv', 'embed'),
  'norm': ('layers', 'embed'),
  'pooler': ('embed', 'mlp'),
  'bias': ('vocab',),
}
SIZES = {'vocab': 11, 'embed': 6, 'heads': 2, 'kv': 3, 'mlp': 8, 'layers': 3}
MATRICES = {'embedding', 'query', 'out', 'pooler'}
TABLE = [
  ('adam', {}),
  ('sgd', {'momentum': 0.9}),
  ('adamw', {'b2': 0.95}),
  ('lamb', {'lr': 0.03}),
  ('lion', {'lr': 0.01}),
  ('adafactor', {'lr': 0.03}),
  ('muon', {'args': {'adam_learning_rate': 0.03}}),
]


def make_params(seed: int = 0, axes=AXES):
  rng = np.random.default_rng(seed)
  return {
    name: np.asarray(rng.normal(size=[SIZES[n] for n in names]) + 0.5, np.float32)
    for name, names in sorted(axes.items())
  }


def choose(*names):
  return {name: AXES[name] for name in names}


def updated(tx, grads, params):
  """The parameters after one update."""

  @jax.jit
  def run(grads, params):
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)

  return run(grads, params)


@pytest.mark.parametrize(('name', 'kwargs'), TABLE, ids=[name for name, _ in TABLE])
def test_every_optimizer_lowers_a_quadratic(name, kwargs):
  axes = choose('query', 'out', 'bias')
  tx = Optimizer(name=name, **{'lr': 0.05, 'schedule': 'constant', **kwargs}).transform(axes, 100)
  params, goal = make_params(0, axes), make_params(1, axes)

  def loss(params):
    return sum(jnp.mean((params[key] - goal[key]) ** 2) for key in params)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), loss(params)

  shapes = jax.eval_shape(tx.init, params)
  run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=100))
  (_, state), losses = run(params)
  assert jax.tree.all(
    jax.tree.map(lambda x, s: (x.shape, x.dtype) == (s.shape, s.dtype), state, shapes)
  )
  losses = np.asarray(losses)
  assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
  ('name', 'kwargs', 'decay'),
  [(*row, 0.1) for row in TABLE] + [('adamw', {}, 0.0), ('lion', {}, 0.0)],
)
def test_weight_decay_touches_exactly_the_matrices(name, kwargs, decay):
  kwargs = {**kwargs, 'lr': 0.01, 'schedule': 'constant', 'weight_decay': decay}
  params = make_params()
  tx = Optimizer(name=name, **kwargs).transform(AXES, 10)
  new = updated(tx, jax.tree.map(np.zeros_like, params), params)
  for key, value in new.items():
    lr = 0.03 if name == 'muon' and key == 'embedding' else 0.01
    rate = 1.0 if name == 'lamb' and decay else decay  # the trust ratio divides by the decay
    if key in MATRICES and decay:
      np.testing.assert_allclose(value, params[key] * (1 - lr * rate), rtol=1e-6, err_msg=key)
    else:
      np.testing.assert_array_equal(value, params[key], err_msg=key)


def test_adamw_equals_numpy():
  optimizer = Optimizer(lr=0.02, warmup_steps=5, weight_decay=0.1, b1=0.8, b2=0.9, eps=1e-6, clip=1)
  axes = choose('embedding', 'query_bias')
  tx, params = optimizer.transform(axes, 20), make_params(0, axes)
  state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
  expected = {key: np.asarray(p, np.float64) for key, p in params.items()}
  m, v = ({key: np.zeros_like(p) for key, p in expected.items()} for _ in range(2))
  for n in range(1, 21):
    grads = make_params(n, axes)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    norm = math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
    lr = 0.02 * (n / 5 if n <= 5 else (1 + math.cos(math.pi * (n - 5) / 15)) / 2)
    for key, grad in grads.items():
      grad = np.asarray(grad, np.float64) / max(norm, 1)
      m[key] = 0.8 * m[key] + 0.2 * grad
      v[key] = 0.9 * v[key] + 0.1 * grad**2
      step = m[key] / (1 - 0.8**n) / (np.sqrt(v[key] / (1 - 0.9**n)) + 1e-6)
      expected[key] -= lr * (step + 0.1 * (key in MATRICES) * expected[key])
  for key, value in params.items():
    np.testing.assert_allclose(value, expected[key], rtol=2e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize(
  ('kwargs', 'pinned'),
  [
    ({'schedule': 'constant'}, {0: 2, 99: 2}),
    ({'schedule': 'constant', 'warmup_steps': 4}, {0: 0.5, 1: 1, 3: 2, 4: 2, 99: 2}),
    ({'schedule': 'linear', 'warmup_steps': 20}, {0: 0.1, 19: 2, 59: 1, 99: 0, 150: 0}),
    ({'schedule': 'linear', 'final_lr': 0.1}, {0: 1.982, 49: 1.1, 99: 0.2}),
    (
      {'schedule': 'cosine', 'warmup_steps': 20},
      {0: 0.1, 19: 2, 39: 1 + math.sqrt(0.5), 59: 1, 99: 0},
    ),
    ({'schedule': 'cosine', 'final_lr': 0.5}, {49: 1.5, 99: 1, 200: 1}),
    ({'schedule': 'rsqrt', 'warmup_steps': 4}, {0: 0.5, 3: 2, 15: 1, 63: 0.5, 99: 0.4}),
    ({'schedule': 'rsqrt'}, {0: 2, 3: 1, 99: 0.2}),
    ({'schedule': 'wsd', 'warmup_steps': 10}, {0: 0.2, 9: 2, 50: 2, 79: 2, 89: 1, 98: 0.1, 99: 0}),
    ({'schedule': 'wsd', 'decay_fraction': 0.5, 'final_lr': 0.1}, {0: 2, 49: 2, 74: 1.1, 99: 0.2}),
  ],
)
def test_schedule_values(kwargs, pinned):
  schedule = Optimizer(lr=2.0, **kwargs).schedule_fn(100)
  found = {count: schedule(count) for count in pinned}
  assert all(lr.dtype == jnp.float32 for lr in found.values())
  assert found == pytest.approx(pinned, rel=1e-5, abs=1e-6)
  assert jax.jit(schedule)(jnp.int32(7)) == pytest.approx(float(schedule(7)))


@pytest.mark.parametrize('name', ['adamw', 'lamb', 'muon', 'adafactor'])
def test_moments_lie_where_their_parameters_lie(name):
  params = make_params()
  tx = Optimizer(name=name, ema=0.9, weight_decay=0.1).transform(AXES, 100)
  state = jax.eval_shape(tx.init, params)
  places = shardings(state, params, {key: key for key in params}, 'replicated')
  counted = {
    key: sum(place == key for place in jax.tree.leaves(places)) for key in (*params, 'replicated')
  }
  moments = {'adamw': 3, 'lamb': 3, 'adafactor': 2}
  for key in params:
    muon = 2 if key in MATRICES - {'embedding'} else 3
    assert counted[key] == moments.get(name, muon), key
  for place, kept in zip(jax.tree.leaves(places), jax.tree.leaves(state), strict=True):
    assert kept.size <= 18 if place == 'replicated' else kept.shape == params[place].shape


def test_moving_average_equals_hand_computation():
  tx = Optimizer(name='sgd', lr=0.1, schedule='constant', ema=0.9).transform({'w': ('embed',)}, 9)
  params = {'w': jnp.asarray([1.0, 2.0], jnp.bfloat16)}
  grads = {'w': jnp.asarray([1.0, -2.0], jnp.bfloat16)}
  state = tx.init(params)
  expected = np.asarray([1.0, 2.0])
  for _ in range(5):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    expected = 0.9 * expected + 0.1 * np.asarray(params['w'], np.float64)
  assert averaged(state)['w'].dtype == jnp.float32
  np.testing.assert_allclose(averaged(state)['w'], expected, rtol=1e-6)
  assert averaged(Optimizer().transform({'w': ('embed',)}, 9).init(params)) is None


def test_clip_is_of_the_global_norm():
  tx = Optimizer(name='sgd', lr=1.0, schedule='constant', clip=1.0).transform(
    {'a': ('embed',), 'b': ('embed',)}, 9
  )
  params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  big = updated(tx, {'a': jnp.full(1, 30.0), 'b': jnp.full(1, -40.0)}, params)
  small = updated(tx, {'a': jnp.full(1, 0.3), 'b': jnp.full(1, -0.4)}, params)
  assert (big['a'][0], big['b'][0]) == pytest.approx((-0.6, 0.8))
  assert (small['a'][0], small['b'][0]) == pytest.approx((-0.3, 0.4))


@pytest.mark.parametrize('name', ['muon', 'lamb', 'adafactor'])
def test_a_stack_of_layers_is_updated_layer_by_layer(name):
  """Scanning over layers is no axis of an experiment: stacked or not, the numbers are the same."""
  args = {'adafactor': {'min_dim_size_to_factor': 2}, 'muon': {'ns_steps': 1}}.get(name, {})
  optimizer = Optimizer(name=name, lr=0.1, weight_decay=0.1, args=args)
  axes = choose('query', 'pooler') | {'deep': ('layers', 'embed')}
  params, grads = (
    {**make_params(s, AXES), 'deep': np.ones((2, 6), np.float32) * (s + 1)} for s in (0, 1)
  )
  params, grads = ({key: tree[key] for key in axes} for tree in (params, grads))

  def split(tree, cut):
    stacked = {key for key, names in axes.items() if names[0] == 'layers'}
    plain = {key: x for key, x in tree.items() if key not in stacked}
    height = {key: 2 if key == 'deep' else 3 for key in stacked}
    return plain | {f'{k}{i}': cut(tree[k], i) for k in stacked for i in range(height[k])}

  whole = updated(optimizer.transform(axes, 10), grads, params)
  tx = optimizer.transform(split(axes, lambda names, i: names[1:]), 10)
  single = updated(tx, *(split(tree, lambda x, i: x[i]) for tree in (grads, params)))
  for key, value in split(whole, lambda x, i: x[i]).items():
    np.testing.assert_allclose(value, single[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_muon_orthogonalises_the_flattened_matrix():
  optimizer = Optimizer(name='muon', lr=0.1, schedule='constant', args={'nesterov': False})
  axes = choose('query', 'out', 'embedding', 'query_bias')
  params, grads = make_params(0, axes), make_params(1, axes)
  new = updated(optimizer.transform(axes, 10), grads, params)
  for key in ('query', 'out'):
    change = np.asarray(params[key] - new[key]).reshape(3, 6, 6)
    singular = np.linalg.svd(change / 0.1, compute_uv=False)
    assert 0.5 < singular.min() < singular.max() < 1.5, key
  for key in ('embedding', 'query_bias'):  # Adam's first step is the sign
    np.testing.assert_allclose(params[key] - new[key], 0.1 * jnp.sign(grads[key]), rtol=1e-3)


@pytest.mark.parametrize(
  ('kwargs', 'sentence'),
  [
    ({'name': 'adamv'}, 'unknown optimizer.name "adamv" (did you mean "adam'),
    ({'name': 'lbfgs'}, 'unknown optimizer.name "lbfgs"'),
    ({'schedule': 'cosin'}, 'unknown optimizer.schedule "cosin" (did you mean "cosine"?)'),
    ({'name': 'sgd', 'b1': 0.9}, 'optimizer "sgd" takes no b1 here'),
    ({'momentum': 0.9}, 'optimizer "adamw" takes no momentum here'),
    ({'args': {'nesterv': True}}, 'takes no nesterv here (did you mean "nesterov"?)'),
    ({'args': {'weight_decay': 1.0}}, 'optimizer "adamw" takes no weight_decay here'),
    ({'name': 'prodigy', 'weight_decay': 0.1}, '"prodigy" finds its own step size'),
    ({'lr': -1.0}, 'optimizer.lr must be a number from 0 to below inf, not -1.0'),
    ({'lr': float('nan')}, 'optimizer.lr'),
    ({'lr': '1e-3'}, 'optimizer.lr'),
    ({'lr': None}, 'optimizer.lr'),
    ({'clip': float('inf')}, 'optimizer.clip'),
    ({'ema': 1.0}, 'optimizer.ema must be a number from 0 to below 1, not 1.0'),
    ({'b2': 1.0}, 'optimizer.b2'),
    ({'warmup_steps': 1.5}, 'optimizer.warmup_steps must be an integer from 0 to below inf'),
    ({'weight_decay': True}, 'optimizer.weight_decay'),
    ({'warmup_steps': 100}, 'warmup_steps = 100 of 100 steps leave the cosine schedule no'),
    (
      {'schedule': 'wsd', 'warmup_steps': 90},
      'warmup_steps = 90 of 100 steps leave the wsd schedule',
    ),
  ],
)
def test_mistakes_are_sentences(kwargs, sentence):
  with pytest.raises(UserError) as error:
    Optimizer(**kwargs).transform(AXES, 100)
  assert sentence in str(error.value)
  assert '\n' not in str(error.value)
