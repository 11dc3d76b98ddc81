"""The same bits on any mesh, what is kept, what is no checkpoint, mistakes in words."""

import json
import logging
import threading

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmjax.checkpoint import Checkpoints
from lmjax.config import UserError
from lmjax.optimizer import Ema


class State(flax.struct.PyTreeNode):
  step: jax.Array
  params: dict
  opt_state: tuple
  rng: jax.Array


def make_mesh(devices: int):
  shape = (devices // 2, 2) if devices > 2 else (devices, 1)
  kwargs = {'axis_types': (AxisType.Auto,) * 2, 'devices': jax.devices()[:devices]}
  return jax.make_mesh(shape, ('data', 'model'), **kwargs)


def make_state(devices: int = 1, seed: int = 0) -> State:
  rng = np.random.default_rng(seed)
  params = {
    'layers': {'up': jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.bfloat16)},
    'embedding': jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
    'bias': jnp.asarray([np.nan, np.inf, -0.0, 1e-40], jnp.float32),
  }
  tx = optax.chain(optax.clip(1.0), optax.adamw(1e-3), optax.identity())
  key = jax.random.key(seed, impl='rbg')
  state = State(step=jnp.int32(2**30 + seed), params=params, opt_state=tx.init(params), rng=key)
  mesh = make_mesh(devices)
  return jax.tree.map(lambda x: jax.device_put(x, sharding(mesh, x)), state)


def sharding(mesh, x) -> NamedSharding:
  return NamedSharding(
    mesh, PartitionSpec(*((None, 'data', 'model')[3 - x.ndim :] if x.ndim > 1 else ()))
  )


def like(state, devices: int = 1):
  mesh = make_mesh(devices)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, x)), state
  )


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(('source', 'target'), [(8, 8), (8, 4), (8, 2), (8, 1), (1, 8)])
def test_the_same_bits_on_any_mesh(tmp_path, source, target):
  state = make_state(source)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(like(state, target)) is None
    checkpoints.save(5, state, {'tokens': 2**40, 'names': ['a', 'ü']})
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    wanted = like(state, target)
    step, found, meta = checkpoints.restore(wanted)
  assert (step, meta) == (5, {'tokens': 2**40, 'names': ['a', 'ü']})
  assert_same_bits(found, state)
  assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, found, wanted))


def test_the_parameters_alone(tmp_path):
  state = make_state()
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.average_path() == 'params'
    checkpoints.save(1, state, {})
    checkpoints.wait()
    assert checkpoints.average_path(1) == 'params'
    averaged = state.replace(opt_state=(*state.opt_state, Ema(state.params)))
    checkpoints.save(2, averaged, {})
    checkpoints.wait()
    assert checkpoints.average_path() == 'opt_state/3/average'
    assert_same_bits(
      checkpoints.restore_subtree('opt_state/3/average', like(state.params))[1], state.params
    )
    _, params, _ = checkpoints.restore_subtree('params', like(state.params, 8))
    assert_same_bits(params, state.params)
    _, mu, _ = checkpoints.restore_subtree('opt_state/1/0/mu', like(state.params))
    assert_same_bits(mu, state.opt_state[1][0].mu)
    _, rng, _ = checkpoints.restore_subtree('rng', like(state.rng))
    assert_same_bits(rng, state.rng)
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    _, arrays, _ = checkpoints.restore_subtree('params', bare)
    assert isinstance(arrays['embedding'], np.ndarray)
    assert_same_bits(arrays, state.params)


def test_a_save_is_committed_in_the_background_and_close_leaves_nothing(tmp_path, caplog, capfd):
  before = set(threading.enumerate())
  overwrite = jax.jit(lambda x: jax.tree.map(lambda a: a * 0 - 1, x), donate_argnums=0)
  state = {'w': jnp.ones((1 << 20,))}
  reader = Checkpoints(tmp_path, read_only=True)
  with caplog.at_level(logging.INFO), Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state, {'step': step})
      state = overwrite(state)  # the training step reuses the memory that is being saved
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
  with reader:
    for step, value in ((1, 1.0), (2, -1.0)):
      _, found, meta = reader.restore(like(state), step)
      assert meta == {'step': step}
      assert float(found['w'].min()) == float(found['w'].max()) == value
  assert set(threading.enumerate()) == before
  assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '2']
  assert not [record for record in caplog.records if 'orbax' in record.pathname]
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize(
  ('kwargs', 'kept'),
  [
    ({'keep_last': 1}, [6]),
    ({'keep_last': 3}, [4, 5, 6]),
    ({'keep_last': 1, 'keep_every': 2}, [2, 4, 6]),
    ({'keep_last': 1, 'keep_best': 'validation/loss'}, [3, 6]),
    ({'keep_last': 1, 'keep_best': 'validation/accuracy'}, [1, 6]),
    ({'keep_last': 2, 'keep_every': 4, 'keep_best': 'validation/loss'}, [3, 4, 5, 6]),
    ({'keep_last': 1, 'keep_best': 'other'}, [6]),
  ],
)
def test_what_is_kept(tmp_path, kwargs, kept):
  values = {1: 0.9, 2: 0.7, 3: 0.1, 4: float('nan'), 5: 0.1}
  for steps in ((1, 2, 3), (4, 5, 6)):  # two runs: what the first one measured still counts
    with Checkpoints(tmp_path, **kwargs) as checkpoints:
      for step in steps:
        names = ('validation/loss', 'validation/accuracy') if step in values else ()
        metrics = dict.fromkeys(names, values.get(step)) or None
        checkpoints.save(step, {'w': jnp.ones(2)}, {}, metrics)
  with Checkpoints(tmp_path, read_only=True, **kwargs) as checkpoints:
    assert checkpoints.steps() == kept
    best = {'validation/loss': 3, 'validation/accuracy': 1}.get(kwargs.get('keep_best'))
    assert checkpoints.best() == best


def test_what_has_no_meta_is_no_checkpoint(tmp_path):
  state = {'w': jnp.arange(4.0)}
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, state, {})
  (tmp_path / '77').mkdir()
  (tmp_path / '30' / 'state').mkdir(parents=True)
  (tmp_path / '40.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  (tmp_path / 'notes').mkdir()
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.restore(like(state))[0] == 20
    for step in (30, 25):  # a directory is in the way; older than the newest directory
      checkpoints.save(step, state, {'new': True})
      checkpoints.wait()
      assert checkpoints.meta(step) == {'new': True}
      assert not (tmp_path / '40.orbax-checkpoint-tmp').exists()
    assert checkpoints.steps() == [25, 30]
    with pytest.raises(ValueError, match='already exists'):
      checkpoints.save(30, state, {})


def test_a_failed_save_is_raised_once_and_leaves_nothing(tmp_path, monkeypatch):
  state = {'w': jnp.arange(4.0)}
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
      patch.setattr('orbax.checkpoint.PyTreeCheckpointHandler.finalize', fail)
      checkpoints.save(2, state, {})
      with pytest.raises(OSError, match='disk full'):
        checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ['1']
    checkpoints.save(2, state, {})
    with pytest.raises(TypeError):
      checkpoints.save(3, state, {'not json': object()})
    with pytest.raises(ValueError, match='zero size'):
      checkpoints.save(3, {'w': jnp.zeros(0)}, {})
    checkpoints.save(3, state, {})
  assert [path.name for path in tmp_path.iterdir()] == ['3']


def fail(*args, **kwargs):
  raise OSError(28, 'disk full')


def test_half_deleted_steps_are_no_checkpoints(tmp_path, monkeypatch):
  """A kill during deletion: the second removal never happens."""
  from etils.epath import gpath

  state, removed = {'w': jnp.ones(2)}, []
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    rmtree = gpath.PosixGPath.rmtree
    monkeypatch.setattr(
      gpath.PosixGPath,
      'rmtree',
      lambda path, *args, **kw: fail() if removed else removed.append(rmtree(path, *args, **kw)),
    )
    checkpoints.save(2, state, {})
    with pytest.raises(OSError, match='disk full'):
      checkpoints.wait()
    assert (tmp_path / '1').exists()
    assert checkpoints.steps() == [2]


def test_mistakes_are_sentences(tmp_path):
  state = {'params': {'a': jnp.ones((4, 2)), 'b': jnp.ones(3)}, 'rng': jax.random.key(0)}
  with Checkpoints(tmp_path / 'run') as checkpoints:
    with pytest.raises(UserError, match=r'no checkpoint of step 3 in .*/run \(there: none\)'):
      checkpoints.restore(like(state), 3)
    checkpoints.save(1, state, {})
    checkpoints.save(2, state, {})
    checkpoints.wait()
    for call in (
      checkpoints.meta,
      checkpoints.structure,
      lambda s: checkpoints.restore(like(state), s),
    ):
      with pytest.raises(UserError, match=r'no checkpoint of step 3 in .*/run \(there: 1, 2\)'):
        call(3)

    def complaint(**changes):
      with pytest.raises(UserError) as error:
        checkpoints.restore(like(state | changes))
      assert '\n' not in str(error.value)
      return str(error.value).removeprefix(f'checkpoint {tmp_path}/run/2 does not fit: ')

    a, b = state['params'].values()
    assert complaint(params={'a': a[:3], 'b': b}) == (
      'params/a is float32[4, 2] there and float32[3, 2] here'
    )
    assert complaint(params={'a': a, 'b': b.astype(jnp.bfloat16)}) == (
      'params/b is float32[3] there and bfloat16[3] here'
    )
    assert complaint(params={'a': a}) == 'params/b is only in it'
    assert complaint(more=b) == 'more is not in it'
    assert complaint(rng=jax.random.key(0, impl='rbg')) == (
      'rng is uint32[2] there and uint32[4] here'
    )
    assert complaint(params={'c': a, 'd': a, 'e': a}).endswith('params/e is not in it; and 2 more')
  with pytest.raises(UserError, match=r'no checkpoint directory .*/absent'):
    Checkpoints(tmp_path / 'absent', read_only=True)
  assert not (tmp_path / 'absent').exists()
  with pytest.raises(UserError, match='keep_last=0'):
    Checkpoints(tmp_path, keep_last=0)


def test_the_document_is_plain_json(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'w': jnp.ones(2)}, {'a': 1}, {'loss': jnp.float32(0.5)})
  text = (tmp_path / '1' / 'meta' / 'metadata').read_text()
  assert json.loads(text) == {'meta': {'a': 1}, 'metrics': {'loss': 0.5}}
