"""The same bits on any mesh, what is kept, what is no checkpoint, mistakes in words."""

import gc
import json
import logging
import os
import pathlib
import shutil
import threading
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lmjax import config, disk, evaluate, experiment, fingerprint, train
from lmjax import sharding as sharding_lib
from lmjax.checkpoint import Checkpoints
from lmjax.errors import StorageError, UserError
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


def test_what_has_no_manifest_is_no_checkpoint(tmp_path, capsys):
  state = {'w': jnp.arange(4.0)}
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, state, {})
  (tmp_path / '77').mkdir()
  (tmp_path / '30' / 'state').mkdir(parents=True)
  (tmp_path / '88').write_text('a file')
  (tmp_path / '40.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  (tmp_path / '.deleting-5' / 'state').mkdir(parents=True)
  (tmp_path / 'notes').mkdir()
  (tmp_path / '007').mkdir()
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.steps() == [10, 20]
  assert (tmp_path / '40.orbax-checkpoint-tmp').exists()
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    said = capsys.readouterr().err
    for step in (30, 77, 88):
      where = f'{tmp_path}/quarantine/{step}'
      assert (
        f'lmjax: checkpoint {tmp_path}/{step} is damaged (it has no manifest): moved to {where}\n'
        in said
      )
    assert sorted(p.name for p in tmp_path.iterdir()) == ['007', '10', '20', 'notes', 'quarantine']
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.restore(like(state))[0] == 20
    (tmp_path / '25').mkdir()  # while the run goes on
    for step in (30, 25):  # older than the newest
      checkpoints.save(step, state, {'new': True})
      checkpoints.wait()
      assert checkpoints.meta(step) == {'new': True}
    assert checkpoints.steps() == [25, 30]
    checkpoints.save(30, state, {})
    with pytest.raises(AssertionError):
      checkpoints.wait()
  assert sorted(p.name for p in (tmp_path / 'quarantine').iterdir()) == ['25', '30', '77', '88']


def test_a_failed_save_is_raised_once_and_leaves_nothing(tmp_path, monkeypatch):
  state = {'w': jnp.arange(4.0)}
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    said = rf'checkpoint 2 could not be saved in {tmp_path}: \[Errno 28\] disk full'
    for broken in ('PyTreeCheckpointHandler.finalize', 'Checkpointer.save'):
      with monkeypatch.context() as patch:
        patch.setattr(f'orbax.checkpoint.{broken}', fail)
        with pytest.raises(StorageError, match=said):  # noqa: PT012
          checkpoints.save(2, state, {})
          checkpoints.wait()
      assert [path.name for path in tmp_path.iterdir()] == ['1']
    checkpoints.save(2, state, {})
    with pytest.raises(TypeError):
      checkpoints.save(3, state, {'not json': object()})
    with pytest.raises(ValueError, match='w has no elements'):
      checkpoints.save(3, {'w': jnp.zeros(0)}, {})
    checkpoints.save(3, state, {})
  assert [path.name for path in tmp_path.iterdir()] == ['3']
  assert StorageError.exit_code == 74


def fail(*args, **kwargs):
  raise OSError(28, 'disk full')


@pytest.fixture
def elsewhere(monkeypatch):
  """elsewhere() is what another process says that could not save, of the save under way."""
  heard = {}
  monkeypatch.setattr(disk.processes, 'on', heard.__setitem__)
  return lambda: heard['unsaved'](1, disk._newest)


def test_what_another_process_could_not_save_is_left_alone(tmp_path, monkeypatch, elsewhere):
  """The thread that waits for it meets no later save, and deletes nothing."""
  state, real, attempts, gate = {'w': jnp.arange(4.0)}, disk.write, [], threading.Event()

  def write(path, arrays, manifest, attempt):
    attempts.append(attempt)
    gate.wait(60)
    real(path, arrays, manifest, attempt)

  checkpoints = Checkpoints(tmp_path, keep_last=1)
  checkpoints.save(1, state, {})
  checkpoints.wait()
  monkeypatch.setattr(disk, 'write', write)
  checkpoints.save(2, state, {})
  while not attempts:
    time.sleep(0.01)
  (tmp_path / '2.orbax-checkpoint-tmp').mkdir()
  Checkpoints(tmp_path, read_only=True).close()  # as `init_from` opens others
  elsewhere()
  with pytest.raises(StorageError, match='another process could not save its part'):
    checkpoints.wait()
  assert [path.name for path in tmp_path.iterdir()] == ['1']
  monkeypatch.setattr(disk, 'write', real)
  with Checkpoints(tmp_path, keep_last=2) as after_a_roll_back:
    after_a_roll_back.save(3, state, {})
    after_a_roll_back.wait()
    assert disk._newest > attempts[0]
    gate.set()
    disk._left[-1].join(60)
    assert after_a_roll_back.steps() == [1, 2, 3]


def test_no_more_than_two_copies_wait_for_others(tmp_path, monkeypatch, elsewhere):
  state, gates = {'w': jnp.arange(4.0)}, []

  def write(*_):
    gates.append(threading.Event())
    gates[-1].wait(60)
    raise OSError(5, 'the other did not come')

  monkeypatch.setattr(disk, 'write', write)
  checkpoints = Checkpoints(tmp_path, keep_last=1)
  for step in (1, 2):
    checkpoints.save(step, state, {})
    while len(gates) < step:
      time.sleep(0.01)
    elsewhere()
    with pytest.raises(StorageError):
      checkpoints.wait()
  alive = lambda: sum(thread.is_alive() for thread in disk._left)
  assert alive() == 2
  threading.Timer(0.5, gates[0].set).start()
  began = time.monotonic()
  checkpoints.save(3, state, {})
  assert time.monotonic() - began > 0.3
  for gate in gates[1:]:
    gate.set()
  while len(gates) < 3:
    time.sleep(0.01)
  gates[2].set()
  with pytest.raises(StorageError, match='the other did not come'):
    checkpoints.close()


def test_half_deleted_steps_are_no_checkpoints(tmp_path, monkeypatch, capsys):
  """A kill during deletion: after the renaming nothing is removed."""
  from etils.epath import gpath

  state = {'w': jnp.ones(2)}
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
      patch.setattr(gpath.PosixGPath, 'rmtree', fail)
      checkpoints.save(2, state, {})
      checkpoints.wait()
    assert f'{tmp_path}/.deleting-1 could not be deleted: [Errno 28]' in capsys.readouterr().err
    assert checkpoints.steps() == [2]
  with Checkpoints(tmp_path) as checkpoints:
    assert [path.name for path in tmp_path.iterdir()] == ['2']


# ---------------------------------------------------------------------------------------- damage


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1 << (len(data) % 8)
  path.write_bytes(data)


DAMAGES = {
  'flipped': flip,
  'cut': lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  'emptied': lambda path: path.write_bytes(b''),
  'deleted': lambda path: path.unlink(),
}


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  directory = tmp_path_factory.mktemp('checkpoints')
  with Checkpoints(directory) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(8, seed=step), {'step': step}, {'loss': step})
  return directory


FILES = [
  *('_CHECKPOINT_METADATA', 'meta/metadata', 'state/_METADATA', 'state/_sharding'),
  *('state/manifest.ocdbt', 'state/d/*', 'state/array_metadatas/process_0'),
  *('state/ocdbt.process_0/manifest.ocdbt', 'state/ocdbt.process_0/d/*'),
]


NEEDED = ('meta/metadata', 'state/d/*')


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # what Orbax leaves
@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('pattern', FILES)
def test_a_damaged_step_is_set_aside_or_bit_equal(tmp_path, two_steps, pattern, damage, capsys):
  damaged = 0
  for number, file in enumerate(sorted((two_steps / '2').glob(pattern))):
    directory = tmp_path / str(number)
    shutil.copytree(two_steps, directory)
    DAMAGES[damage](directory / file.relative_to(two_steps))
    with Checkpoints(directory) as checkpoints:
      step, state, meta = checkpoints.restore(like(make_state(), 4))
      assert_same_bits(state, make_state(seed=step))
      assert meta == {'step': step}
      said = capsys.readouterr().err
      aside = directory / 'quarantine' / '2'
      assert (step == 1) == aside.exists() == (f'{directory}/2 is damaged (' in said)
      if step == 1:
        damaged += 1
        checkpoints.save(2, state, {'step': 'again'})
    assert checkpoints.meta(2) == {'step': 'again' if step == 1 else 2}
  gc.collect()
  assert damaged or pattern not in NEEDED


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_flipped_bits_in_arrays_that_orbax_does_not_notice(tmp_path):
  state = {'w': jnp.asarray(np.random.default_rng(0).normal(size=20_000), jnp.float32)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
  file = max((tmp_path / '1' / 'state').rglob('*'), key=lambda path: path.stat().st_size)
  data, said = file.read_bytes(), []
  assert len(data) > 50_000
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    for place in range(1000, len(data), len(data) // 8):
      file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
      with pytest.raises(StorageError) as error:
        checkpoints.restore(like(state), 1)
      said.append(str(error.value))
    file.write_bytes(data)
    assert_same_bits(checkpoints.restore(like(state), 1)[1], state)
  gc.collect()
  assert any('/1 is damaged: w: not what was saved' in text for text in said)


def test_arrays_of_another_step_are_not_taken_for_this_one(tmp_path, two_steps, capsys):
  shutil.copytree(two_steps, tmp_path / 'c')
  for name in ('1', '2'):
    (tmp_path / 'c' / name).rename(tmp_path / name)
  (tmp_path / '2' / 'state').rename(tmp_path / 'c' / '2')
  (tmp_path / '1' / 'state').rename(tmp_path / '2' / 'state')
  (tmp_path / 'c' / '2').rename(tmp_path / '1' / 'state')
  wanted = like(make_state())
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    with pytest.raises(StorageError, match=r'/2 is damaged: step and \d+ more: not what was saved'):
      checkpoints.restore(wanted, 2)
    with pytest.raises(
      StorageError, match=r'no checkpoint in .* is whole, and a run does not begin'
    ):
      checkpoints.restore(wanted)
    assert checkpoints.steps() == [1, 2]
  for _ in range(2):
    with (
      Checkpoints(tmp_path) as checkpoints,
      pytest.raises(StorageError, match=r'/2: step and \d+ more: not what .*/1: step and \d+ more'),
    ):
      checkpoints.restore(wanted)
    assert capsys.readouterr().err == ''
  for step in (1, 2):  # now nothing is left of them but what is set aside
    (tmp_path / str(step) / 'meta' / 'metadata').unlink()
  for _ in range(2):
    with (
      Checkpoints(tmp_path) as checkpoints,
      pytest.raises(StorageError, match=r'no checkpoint in .* is whole, and a run does not begin'),
    ):
      checkpoints.restore(wanted)
  assert sorted(p.name for p in (tmp_path / 'quarantine').iterdir()) == ['1', '2']


def test_a_newer_format_is_refused_and_left_alone(tmp_path, monkeypatch):
  state = {'w': jnp.ones(2)}
  with monkeypatch.context() as patch, Checkpoints(tmp_path) as checkpoints:
    patch.setattr('lmjax.steps.FORMAT', 9)
    checkpoints.save(1, state, {})
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(UserError, match=r'/1 has format 9, of a newer lmjax; this one reads formats up'),
  ):
    checkpoints.restore(like(state))
  assert [path.name for path in tmp_path.iterdir()] == ['1']


def test_another_type_is_refused_unless_asked_for(tmp_path):
  state = {'w': jnp.arange(4.0), 'key': jax.random.key(0)}
  half = {'w': state['w'].astype(jnp.bfloat16), 'key': state['key']}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    with pytest.raises(UserError, match=r'w is float32.* there and bfloat16.* here'):
      checkpoints.restore(like(half))
    _, found, _ = checkpoints.restore(like(half), cast=True)
    assert_same_bits(found, half)
    longer = {'w': jnp.arange(5.0), 'key': state['key']}
    with pytest.raises(UserError, match=r'w is float32\[4\] there and float32\[5\] here'):
      checkpoints.restore(like(longer), cast=True)


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


def test_the_newest_regular_step_is_kept(tmp_path):
  """Whatever is saved between: there a run goes back to."""
  with Checkpoints(tmp_path, keep_last=1, regular=10) as checkpoints:
    for step in (10, 20, 23, 27):
      checkpoints.save(step, {'w': jnp.ones(2)}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [20, 27]


def test_the_manifest_is_plain_json(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'w': jnp.ones(2)}, {'a': 1}, {'loss': jnp.float32(0.5)})
  manifest = json.loads((tmp_path / '1' / 'meta' / 'metadata').read_text())
  assert len(manifest.pop('digest')) == 32
  assert manifest == {
    'format': 1,
    'step': 1,
    'meta': {'a': 1},
    'metrics': {'loss': 0.5},
    'arrays': {'w': ['float32', [2], fingerprint.of({'w': np.ones(2, np.float32)})['w']]},
  }


# ------------------------------------------------------------------------ what was saved long ago

GOLDEN = pathlib.Path('tests/golden_checkpoint')  # format 1: step 3 of a GPT of 3,848 parameters
LAYOUTS = {
  'whole': {},
  'unrolled': {'model.scan': False},
  'zero': {'sharding.strategy': 'zero'},
  'fsdp': {'sharding.strategy': 'fsdp'},
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_golden_checkpoint_opens_for_ever(layout):
  """Where this fails, the runs that people have can no longer be taken up: let old formats in.

  No new file takes this one's place; a new format is a second golden checkpoint beside it.
  """
  with Checkpoints(GOLDEN, read_only=True) as checkpoints:
    c = ConfigDict(checkpoints.meta(3)['config'])
    c.update_from_flattened_dict(LAYOUTS[layout] | {'sharding.max_unsharded': 1.0})
    parts = experiment.sketch(config.resolve(c))
    mesh = sharding_lib.make_mesh(parts.config['sharding'])
    with jax.set_mesh(mesh), sharding_lib.logical_axes(parts.config['sharding']['strategy']):
      step, state, _ = checkpoints.restore(train.init_state(parts, mesh)[0])
      tokens = np.arange(8 * 16).reshape(8, 16) % 250
      batch = {'tokens': tokens, 'targets': tokens[:, ::-1], 'weights': np.ones((8, 16))}
      like = parts.abstract_batch()
      batch = {name: np.asarray(batch[name], like[name].dtype) for name in like}
      terms, _ = evaluate.make_step(parts)(state.params, parts.place(batch, mesh))
  assert (step, int(state.step)) == (3, 3)
  assert fingerprint.together(fingerprint.of(fingerprint.named(state))) == '71a26dcb45855387'
  assert terms['clm'].compute() == pytest.approx(5.557771, rel=1e-5)


def test_a_step_that_goes_while_it_is_looked_at_is_passed_over(tmp_path, monkeypatch):
  """As by the run that is at work, while it is evaluated."""
  state = {'w': jnp.arange(4.0)}
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.save(2, state, {})
  lstat = os.lstat

  def gone(path, *args, **kwargs):
    if f'{tmp_path}/2' in str(path):
      raise FileNotFoundError(path)
    return lstat(path, *args, **kwargs)

  monkeypatch.setattr(os, 'lstat', gone)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.restore(like(state))[0] == 1


@pytest.mark.parametrize('place', ['state', 'state/_METADATA', 'meta/metadata', 'new', '.'])
@pytest.mark.parametrize('kind', ['link', 'pipe'])
def test_what_leads_elsewhere_is_not_read(tmp_path, place, kind, capsys):
  """A link to what is good would be taken for it, and a pipe has no end."""
  state = {'w': jnp.arange(4.0)}
  with Checkpoints(tmp_path / 'run', keep_last=2) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.save(2, state, {})
  step = tmp_path / 'run' / '2'
  there = step / place
  if there.exists():
    there.rename(tmp_path / 'elsewhere')
  there.symlink_to(tmp_path / 'elsewhere') if kind == 'link' else os.mkfifo(there)
  with Checkpoints(tmp_path / 'run', keep_last=2) as checkpoints:
    assert checkpoints.restore(like(state))[0] == 1
  said = capsys.readouterr().err
  assert f'{step} is damaged' in said
  assert 'is neither a file nor a directory' in said or 'it has no manifest' in said
