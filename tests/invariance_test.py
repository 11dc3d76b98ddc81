"""Nothing but the mathematics decides the curve: not devices, micro-batches, scan or remat."""

import math

import jax
import numpy as np
import pytest

from lmjax import sharding, train
from lmjax.data import loader
from lmjax.models import products

VARIANTS = {
  'one device': (1, {}),
  'eight devices': (8, {}),
  'two micro-batches': (4, {'micro_batches': 2}),
  'eight micro-batches': (1, {'micro_batches': 8}),
  'unrolled': (1, {'model.scan': False}),
  'remat full': (2, {'model.remat': 'full'}),
  'remat attended': (2, {'model.remat': 'attended'}),
  'remat dots, unrolled': (1, {'model.remat': 'dots', 'model.scan': False}),
}
OBJECTIVES = {
  'clm': ('clm', {'objective.separate_documents': True, 'optimizer.clip': 0.5}),
  # Many short rows, so that the micro-batches differ in weight.
  'bert': (
    'mlm',
    {
      'objective.next_sentence': True,
      'objective.short_seq_prob': 0.8,
      'model.norm_position': 'post',
    },
  ),
}


# The heads divide by 3, their dims by 2, and the table by both.
SIZES = {'batch': 24, 'model.heads': 3, 'model.dim': 24, 'model.vocab_multiple': 6}
STRATEGIES = {
  'zero': ('clm', {'data': 8}),
  'fsdp': ('bert', {'data': 8}),
  'fsdp over two axes and slices': ('clm', {'replica': 2, 'data': 2, 'model': 2}),
  'tensor': ('bert', {'data': 2, 'model': 3}),
  'tensor over slices': ('clm', {'replica': 2, 'model': 3}),
  'fsdp+tensor': ('clm', {'data': 2, 'model': 3}),
  'sequence': ('clm', {'data': 2, 'sequence': 4}),
  'sequence over slices': ('bert', {'replica': 2, 'data': 2, 'sequence': 2}),
}


def curve(experiment, devices: int | list[int], steps: int = 4) -> np.ndarray:
  """[steps, terms + 1]: every term's mean and the gradient norm, on the first or these devices."""
  c = experiment.config
  devices = range(devices) if isinstance(devices, int) else devices
  mesh = sharding.make_mesh(c['sharding'], [jax.devices()[i] for i in devices])
  with jax.set_mesh(mesh), sharding.logical_axes(c['sharding']['strategy']):
    like, transform, make_state = train.init_state(experiment, mesh)
    # As a run has it: compiled once, it refuses a state that does not stay where it was.
    state, step = make_state(), train.lower(experiment, mesh, like, transform).compile()
    ours = experiment.rows(mesh)
    data, rows = loader.Loader(experiment.examples('train'), c['batch'], c['seed'], ours), []
    for i in range(steps):
      state, numbers = step(state, experiment.place(data.batch(i), mesh))
      numbers = jax.device_get(numbers)
      means = [mean.compute() for mean in numbers['terms'].values()]
      rows.append([*means, float(numbers['optimizer']['grad_norm'])])
  return np.array(rows)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_same_curve_everywhere(parts, name):
  objective, own = OBJECTIVES[name]
  curves = {
    variant: curve(parts(objective, **own, **overrides), devices)
    for variant, (devices, overrides) in VARIANTS.items()
  }
  expected = curves.pop('one device')
  assert expected[-1, 0] < expected[0, 0]
  for variant, got in curves.items():
    np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=variant)


@pytest.mark.parametrize(
  ('variant', 'platform'),
  [(variant, 'cpu') for variant in STRATEGIES]
  # Where gradients go round in rings, and products are made otherwise.
  + [(variant, 'tpu') for variant in ('fsdp', 'fsdp+tensor', 'sequence')],
)
def test_same_curve_under_every_strategy(parts, monkeypatch, variant, platform):
  name, sizes = STRATEGIES[variant]
  objective, own = OBJECTIVES[name]
  mesh = {f'sharding.{axis}': sizes.get(axis, 1) for axis in sharding.MESH_AXES}
  given = {**own, **SIZES, 'model.attention': 'reference'}
  experiment = parts(objective, **given, **mesh, **{'sharding.strategy': variant.split(' ')[0]})
  with monkeypatch.context() as patch:
    patch.setattr(products, 'platform', lambda: platform)
    got = curve(experiment, math.prod(sizes.values()), steps=3)
  expected = curve(parts(objective, **given), 1, steps=3)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_micro_batches_of_unequal_weight_are_not_averaged(parts):
  """The mean of micro-batch means would differ: rows of a batch have different weights here."""
  objective, own = OBJECTIVES['bert']
  experiment = parts(objective, **own)
  batch = loader.Loader(experiment.examples('train'), 8, 0).batch(0)
  weights = batch['weights'].sum(axis=1)
  assert weights.min() < weights.max()


@pytest.mark.parametrize('devices', [1, 8])
def test_dropout_is_the_same_on_any_mesh(parts, devices):
  # Adam's first update is nearly the sign of the gradient, rounding of tiny ones included.
  sgd = {'optimizer.name': 'sgd', 'optimizer.lr': 0.5}
  experiment = parts('clm', **sgd, **{'model.dropout': 0.2, 'model.attention_dropout': 0.2})
  plain = curve(parts('clm', **sgd), 1, steps=2)
  dropped = curve(experiment, devices, steps=2)
  assert not np.allclose(plain[1], dropped[1], rtol=1e-3)
  np.testing.assert_allclose(dropped, curve(experiment, 2, steps=2), rtol=1e-5)


def test_dropout_is_drawn_anew_in_every_step(parts):
  still = {'optimizer.name': 'sgd', 'optimizer.lr': 0.0, 'model.dropout': 0.2}
  experiment, mesh = parts('clm', **still), sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh), sharding.logical_axes('replicate'):
    _, transform, make_state = train.init_state(experiment, mesh)
    state, step = make_state(), jax.jit(train.make_step(experiment, transform))
    batch = loader.Loader(experiment.examples('train'), experiment.config['batch'], 0).batch(0)
    losses = []
    for _ in range(3):
      state, numbers = step(state, batch)
      losses.append(float(numbers['terms']['clm'].total))
  assert len(set(losses)) == 3
