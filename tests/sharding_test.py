"""Where things lie under each strategy, and what cannot lie there."""

import types

import jax
import numpy as np
import pytest

from lmjax import sharding, train
from lmjax.errors import UserError
from tests.conftest import tpus

EIGHT = {'replica': 1, 'data': -1, 'sequence': 1, 'model': 1}


@pytest.mark.parametrize(
  ('sizes', 'shape'),
  [
    (None, (1, 8, 1, 1)),
    ({}, (1, 8, 1, 1)),
    ({'model': 2}, (1, 4, 1, 2)),
    ({'data': 2, 'model': -1}, (1, 2, 1, 4)),
    ({'replica': 2, 'sequence': 2}, (2, 2, 2, 1)),
    ({'data': 1, 'sequence': 8}, (1, 1, 8, 1)),
  ],
)
def test_one_size_is_filled_in(sizes, shape):
  mesh = sharding.make_mesh(None if sizes is None else EIGHT | sizes)
  assert tuple(mesh.shape.values()) == shape
  assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
  ('sizes', 'said'),
  [
    ({'model': 3}, 'does not use the 8 device'),
    ({'data': 4}, 'does not use the 8 device'),
    ({'data': 16}, 'does not use the 8 device'),
    ({'model': -1}, 'one of them -1'),
    ({'model': 0}, 'at least 1'),
    ({'sequence': -2}, 'at least 1'),
  ],
)
def test_a_mesh_of_the_wrong_size_is_a_sentence(sizes, said):
  with pytest.raises(UserError, match=said):
    sharding.make_mesh(EIGHT | sizes)


@pytest.mark.parametrize(
  ('sizes', 'shape'),
  [
    ({'data': 2, 'model': 4}, (1, 2, 1, 4)),
    ({'data': -1, 'model': 2}, (1, 4, 1, 2)),
    ({'data': 4, 'model': 4}, (1, 8, 1, 1)),  # sixteen devices then, eight now
    ({'data': -1, 'model': 3}, (1, 8, 1, 1)),
    ({'data': 1}, (1, 8, 1, 1)),
  ],
)
def test_a_run_is_evaluated_on_its_mesh_where_that_is_possible(parts, sizes, shape):
  made = parts('clm', **{f'sharding.{axis}': size for axis, size in (EIGHT | sizes).items()})
  assert tuple(sharding.mesh_of_run(made.config, made.boxed_shapes).shape.values()) == shape


@pytest.mark.parametrize(
  ('batch', 'dim', 'most'), [(8, 16, 8), (12, 16, 4), (8, 20, 4), (7, 16, 1), (8, 30, 2)]
)
def test_else_on_as_many_devices_as_its_shapes_divide_over(parts, batch, dim, most):
  sixteen = {'sharding.strategy': 'fsdp', 'sharding.data': 16}
  made = parts('clm', batch=batch, **{'model.dim': dim}, **sixteen)
  assert sharding.mesh_of_run(made.config, made.boxed_shapes).size == most


def test_hosts_of_cpus_are_no_slices(monkeypatch):
  """JAX numbers their devices as if they were: two hosts of four."""
  monkeypatch.setattr(sharding, 'Mesh', lambda devices, *_, **__: devices)
  stub = lambda i: dict(device_kind='cpu', id=i, process_index=i // 4, slice_index=i // 4)
  devices = [types.SimpleNamespace(platform='cpu', **stub(i)) for i in range(8)]
  assert sharding.make_mesh(EIGHT, devices).shape == (1, 8, 1, 1)


def test_slices_lie_along_replica():
  """Two of eight TPUs each, which are not here."""
  devices = tpus('v5e:2x4@2')
  mesh = sharding.make_mesh(EIGHT | {'replica': 2, 'model': 2}, devices)
  assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
  # Neighbours along the innermost axis are neighbours in the torus.
  for row in mesh.devices.reshape(-1, 2):
    a, b = (np.array(device.coords) for device in row)
    assert np.abs(a - b).sum() == 1
  with pytest.raises(UserError, match=r'sharding\.replica = 1 is no multiple of the 2 slices'):
    sharding.make_mesh(EIGHT, devices)
  assert tuple(sharding.make_mesh(devices=devices).shape.values()) == (2, 8, 1, 1)


@pytest.mark.parametrize(
  ('strategy', 'axis'),
  [('replicate', 'model'), ('zero', 'sequence'), ('tensor', 'sequence'), ('sequence', 'model')],
)
def test_an_axis_that_the_strategy_does_not_use_is_refused(strategy, axis):
  mesh = sharding.make_mesh(EIGHT | {axis: 2})
  with pytest.raises(UserError, match=f'sharding.{axis} = 2, but the strategy "{strategy}"'):
    sharding.check_mesh(mesh, strategy)
  sharding.check_mesh(sharding.make_mesh(), strategy)


def share_held(tree) -> float:
  """The share of a pytree's elements that the first device holds."""
  leaves = jax.tree.leaves(tree)
  held = sum(x.addressable_shards[0].data.size for x in leaves)
  return held / sum(x.size for x in leaves)


@pytest.mark.parametrize(
  ('strategy', 'sizes', 'of_params', 'of_state'),
  [
    ('replicate', {}, 1, 1),
    ('zero', {}, 1, 1 / 8),
    ('fsdp', {}, 1 / 8, 1 / 8),
    ('fsdp', {'model': 2}, 1 / 8, 1 / 8),
    ('tensor', {'model': 2}, 1 / 2, 1 / 2),
    ('fsdp+tensor', {'model': 2}, 1 / 8, 1 / 8),
    ('sequence', {'sequence': 2}, 1 / 8, 1 / 8),
  ],
)
def test_what_a_device_holds(parts, strategy, sizes, of_params, of_state):
  """Biases and norms, which some strategies keep whole, are a few per cent."""
  keys = {f'sharding.{axis}': size for axis, size in {**sizes, 'strategy': strategy}.items()}
  wide = {'model.dim': 64, 'model.heads': 4, 'optimizer.name': 'adamw'}
  made = parts('clm', **keys, **wide, **{'tokenizer.name': 'bytes'})
  vars(made)['model'] = made.objective.model(made.core, 264)  # divides, where the bytes do not
  mesh = sharding.make_mesh(made.config['sharding'])
  like, _, make_state = train.init_state(made, mesh)
  state = make_state()
  assert share_held(state.params) == pytest.approx(of_params, abs=0.05)
  assert share_held(state.opt_state) == pytest.approx(of_state, abs=0.05)
  whole = sharding.unsharded(like.params, mesh, strategy, most=0.1)
  assert whole == 1 if of_params == 1 else whole < 0.1
  if of_params < 1:
    with pytest.raises(UserError, match='lie whole on every device'):
      sharding.unsharded(like.params, mesh, strategy, most=whole - 1e-6)


def test_a_length_that_does_not_divide_is_refused(parts):
  made = parts('clm')
  for strategy, axis in (('sequence', 'sequence'), ('tensor', 'model')):
    config = {**made.config, 'length': 50, 'sharding': {'strategy': strategy}}
    with pytest.raises(UserError, match='length = 50 does not divide over the 4 devices'):
      sharding.check_batch(config, sharding.make_mesh(EIGHT | {axis: 4}))
    sharding.check_batch({**config, 'length': 52}, sharding.make_mesh(EIGHT | {axis: 4}))


@pytest.mark.parametrize(
  ('strategy', 'sizes', 'overrides', 'said'),
  [
    ('tensor', {'model': 4}, {}, r'attention.key.bias: its dimension "heads" of 2 .* 4 devices'),
    ('fsdp', {}, {'model.dim': 20}, r'its dimension "embed" of 20 does not divide over 8 devices'),
    ('fsdp+tensor', {'model': 2}, {}, r'embed.table: its dimension "vocab" of 261 .* 2 devices'),
  ],
)
def test_what_does_not_divide_is_named(parts, strategy, sizes, overrides, said):
  made = parts('clm', **overrides)
  mesh = sharding.make_mesh(EIGHT | sizes)
  with pytest.raises(UserError, match=said):
    sharding.param_shardings(made.boxed_shapes, mesh, strategy)
