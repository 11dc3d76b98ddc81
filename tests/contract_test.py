"""What every objective promises (lmjax/objectives/__init__.py), whatever it trains."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lmjax.data import loader
from lmjax.models import layers

PAIRS = {'objective.next_sentence': True}
OBJECTIVES = {
  'clm': ('clm', {}),
  'clm_documents': ('clm', {'objective.separate_documents': True}),
  'clm_untied_smooth': (
    'clm',
    {'objective.tied': False, 'objective.label_smoothing': 0.1, 'objective.z_loss': 1e-3},
  ),
  'mlm': ('mlm', {}),
  'mlm_documents': ('mlm', {'objective.separate_documents': True}),
  'mlm_words_static': (
    'mlm',
    {'objective.masking': 'word', 'objective.dynamic': False, 'objective.dupe_factor': 3},
  ),
  'mlm_spans': ('mlm', {'objective.masking': 'span', 'objective.rate': 0.3}),
  'bert': ('mlm', {**PAIRS, 'length': 96}),
  'albert': ('mlm', {'objective.sentence_order': True, 'length': 96}),
  'bert_packed': (
    'mlm',
    {**PAIRS, 'objective.pairs_per_row': 4, 'objective.pair_length': 40, 'length': 96},
  ),
}
every_objective = pytest.mark.parametrize('name', OBJECTIVES)


def make(parts, name, **overrides):
  objective, own = OBJECTIVES[name]
  return parts(objective, **{**own, **overrides})


def init(experiment):
  batch = loader.Loader(experiment.examples('train'), experiment.config['batch'], 0).batch(0)
  params = jax.jit(lambda b: nn.unbox(experiment.init_params(jax.random.key(0), b)))(batch)
  return params, batch


def loss_fn(experiment):
  def loss(params, batch):
    terms, _ = experiment.model.apply({'params': params}, batch, train=False)
    return sum(term.total / term.weight for term in terms.values())

  return loss


@every_objective
def test_a_row_depends_on_its_index_and_epoch_alone(parts, name):
  examples = make(parts, name).examples('train')
  indices, epochs = np.array([3, 0, 5, 3]), np.array([0, 0, 2, 1])
  together = examples(indices, epochs)
  for row in range(len(indices)):
    alone = examples(indices[row : row + 1], epochs[row : row + 1])
    for key, value in alone.items():
      np.testing.assert_array_equal(value[0], together[key][row], err_msg=key)


@every_objective
def test_shapes_are_the_same_for_all_rows_and_types_are_narrow(parts, name):
  # Masked objectives evaluate with 15 % whatever they train with.
  more = {'objective.rate': 0.4} if name.startswith('mlm') else {}
  experiment = make(parts, name, **more)
  for split in ('train', 'valid'):
    examples, expected = experiment.examples(split), experiment.abstract_batch(split == 'train')
    for index in (0, len(examples) - 1):
      rows = examples(np.full(2, index), np.zeros(2, int))
      for key, value in rows.items():
        assert value.dtype in (np.int32, np.float32), key
        assert value.shape == (2, *expected[key].shape[1:]), key


@every_objective
def test_evaluation_examples_are_fixed(parts, name):
  seeds = [make(parts, name, seed=seed).examples('valid') for seed in (0, 1)]
  indices = np.arange(min(map(len, seeds)))
  first, second = seeds[0](indices, indices * 0), seeds[1](indices, indices * 0 + 3)
  assert len(seeds[0]) == len(seeds[1])
  for key, value in first.items():
    np.testing.assert_array_equal(value, second[key], err_msg=key)


@every_objective
@pytest.mark.parametrize('initializer', layers.INITS)
def test_initial_loss_is_that_of_knowing_nothing(parts, name, initializer):
  experiment = make(parts, name, **{'model.initializer': initializer})
  params, batch = init(experiment)
  terms, metrics = jax.jit(lambda p, b: experiment.model.apply({'params': p}, b, train=False))(
    params, batch
  )
  assert metrics['xent'].compute() == pytest.approx(math.log(experiment.tokenizer.vocab_size), 0.02)
  if 'nsp' in terms:
    # A head of fan_in adds about 1 / (4 dim) = 0.016 here, of dim 16.
    assert terms['nsp'].compute() == pytest.approx(math.log(2), abs=0.03)


@every_objective
def test_every_parameter_receives_gradient(parts, name):
  experiment = make(parts, name)
  params, batch = init(experiment)
  grads = jax.jit(jax.grad(loss_fn(experiment)))(params, batch)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    # A key's bias shifts all logits of a query alike, which the softmax does not see.
    dead = "'key'" in jax.tree_util.keystr(path) and path[-1].key == 'bias'
    assert dead or float(jnp.abs(grad).max()) > 0, jax.tree_util.keystr(path)
    assert bool(jnp.isfinite(grad).all()), jax.tree_util.keystr(path)


@every_objective
def test_one_batch_can_be_learned_by_heart(parts, name):
  experiment = make(parts, name, **{'model.dim': 32})
  params, batch = init(experiment)
  loss, tx = loss_fn(experiment), optax.adam(1e-2)

  @jax.jit
  def learn(params):
    def body(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params, batch)
      updates, state = tx.update(grads, state)
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(body, (params, tx.init(params)), None, length=150)[1]

  losses = learn(params)
  floor = 0.7 if 'smooth' in name else 0.45
  assert losses[-1] < floor * losses[0], losses[::30]


@every_objective
def test_loss_ignores_what_weighs_nothing(parts, name):
  experiment = make(parts, name)
  params, batch = init(experiment)
  apply = jax.jit(lambda p, b: experiment.model.apply({'params': p}, b, train=False)[0])
  half = {k: v.copy() for k, v in batch.items()}
  for key in half:
    if key.endswith('weights'):
      half[key][4:] = 0
  scrambled = {k: np.concatenate([v[:4], v[3:0:-1], v[:1]]) for k, v in half.items()}
  for key in half:
    if key.endswith('weights'):
      scrambled[key] = half[key]
  for term, mean in apply(params, half).items():
    assert mean.compute() == pytest.approx(apply(params, scrambled)[term].compute(), rel=1e-5)


@pytest.mark.parametrize('name', ['clm', 'clm_untied_smooth', 'mlm', 'mlm_documents'])
def test_logits_are_those_that_the_loss_is_of(parts, name):
  """They are computed on ways of their own: the loss never has all of them in memory."""
  experiment = make(parts, name)
  params, batch = init(experiment)
  noise = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + 0.3 * noise.standard_normal(x.shape).astype(x.dtype), params)
  given = {f'{key}_BL': batch[key] for key in ('tokens', 'segments', 'positions') if key in batch}
  logits = experiment.model.apply({'params': params}, **given, method='logits')
  if 'places' in batch:
    logits = jnp.take_along_axis(logits, batch['places'][..., None], axis=1)
  right = jnp.take_along_axis(nn.log_softmax(logits), batch['targets'][..., None], axis=-1)[..., 0]
  expected = -(right * batch['weights']).sum() / batch['weights'].sum()
  _, metrics = experiment.model.apply({'params': params}, batch, train=False)
  assert metrics['xent'].compute() == pytest.approx(float(expected), rel=1e-5)
