"""deterministic_sum: the same bits on any number of devices, and in several processes."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import canonical, errors, fingerprint, sharding, train
from lmjax.data import loader
from tests.guard_test import killed_after
from tests.processes_test import free_port, spawn
from tests.train_test import Killed, as_file, lines

ASKED = {'deterministic_sum': True, 'batch': 16, 'model.dropout': 0.1, 'optimizer.clip': 0.5}
ASKED |= {'model.depth': 1}


def as_users_have_it(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Compiled without the shortcut of tests, by which the bits depend on the number of devices."""
  return lowered.compile({'xla_cpu_use_fusion_emitters': True})


def on(count: int) -> jax.sharding.Mesh:
  return sharding.make_mesh(devices=jax.devices()[:count])


@pytest.mark.parametrize('count', [1, 2, 4, 8])
def test_it_is_the_sum_in_one_order(count):
  """Half by half, whatever lies where; numbers of all sizes, so that each order has its own."""
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(16, 5)) * 10.0 ** rng.integers(-6, 6, (16, 1))).astype(np.float32)
  scale = np.float32(1.5)

  def part(number, rows, scale):
    return {'sum': rows[0] * scale - rows[1], 'numbers': number * rows[0].astype(jnp.int32)}

  with jax.set_mesh(on(count)), sharding.logical_axes('replicate'):
    found = jax.jit(lambda x: canonical.total(8, x, part, scale))(x)
  sums = x[::2] * scale - x[1::2]
  while len(sums) > 1:
    sums = sums[::2] + sums[1::2]
  np.testing.assert_allclose(found['sum'], sums[0], rtol=1e-6)
  np.testing.assert_array_equal(
    found['numbers'], (np.arange(8)[:, None] * x[::2].astype(np.int32)).sum(0)
  )


@pytest.mark.parametrize(
  ('objective', 'overrides'),
  [
    ('clm', {'model.positions': 'rotary', 'optimizer.name': 'muon', 'model.dtype': 'bfloat16'}),
    ('mlm', {'objective.next_sentence': True, 'model.norm_position': 'post'}),
  ],
)
def test_the_same_bits_on_any_number_of_devices(parts, objective, overrides):
  made, states = parts(objective, **ASKED, **overrides), set()
  for count in (8, 4, 2):
    with jax.set_mesh(mesh := on(count)), sharding.logical_axes('replicate'):
      like, transform, make_state = train.init_state(made, mesh)
      step = as_users_have_it(train.lower(made, mesh, like, transform))
      state, data = make_state(), loader.Loader(made.examples('train'), 16, 0, made.rows(mesh))
      for i in range(3):
        state, _ = step(state, made.place(data.batch(i), mesh))
    states.add(fingerprint.of_tree(state))
  assert len(states) == 1, 'the bits depend on the number of devices'


def test_without_noise_it_is_the_plain_sum(parts):
  values = []
  for asked in (True, False):
    made = parts('mlm', **{**ASKED, 'deterministic_sum': asked, 'model.dropout': 0.0})
    with jax.set_mesh(mesh := on(4)), sharding.logical_axes('replicate'):
      like, transform, make_state = train.init_state(made, mesh)
      data = loader.Loader(made.examples('train'), 16, 0, made.rows(mesh))
      step = train.lower(made, mesh, like, transform).compile()
      state, numbers = step(make_state(), made.place(data.batch(0), mesh))
    values.append(jax.tree.map(np.asarray, (state.params, numbers)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *values)


def test_a_run_goes_on_with_fewer_devices_and_in_two_processes_to_the_bit(
  tiny, tmp_path, monkeypatch
):
  monkeypatch.setattr(train, '_compile', as_users_have_it)
  c = tiny('clm', **ASKED, **{'checkpoint.every': 2})
  expected = train.run(c, str(tmp_path / 'straight'))
  command = ['-m', 'lmjax.main', as_file(c, tmp_path), '--workdir', str(tmp_path / 'two')]
  command += ['--coordinator', f'localhost:{free_port()}', '--processes', '2', '--process']
  flag = '--xla_force_host_platform_device_count=4'
  pair = [spawn([*command, str(i)], flag) for i in range(2)]
  with monkeypatch.context() as patch:
    killed_after(patch, 3)
    with pytest.raises(Killed):
      train.run(c, str(tmp_path / 'moved'))
  with monkeypatch.context() as patch:
    two = on(2)
    patch.setattr(sharding, 'make_mesh', lambda *_: two)
    moved = train.run(c, str(tmp_path / 'moved'))
  said = [process.communicate(timeout=300)[1] for process in pair]
  assert [process.returncode for process in pair] == [0, 0], said
  apart = json.loads((tmp_path / 'two' / 'result.json').read_text())
  assert moved['state_fingerprint'] == expected['state_fingerprint'] == apart['state_fingerprint']
  losses = [
    [line.get('train/loss') for line in lines(tmp_path / run, 'metrics')]
    for run in ('straight', 'moved', 'two')
  ]
  assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
  ('overrides', 'said'),
  [
    ({'virtual_shards': 16, 'deterministic_sum': False}, 'read by nothing'),
    ({'sharding.strategy': 'fsdp'}, 'needs sharding.strategy = "replicate"'),
    ({'micro_batches': 2}, 'and micro_batches = 1'),
    ({'virtual_shards': 6, 'batch': 48}, 'must be a power of two that divides batch = 48'),
    ({'virtual_shards': 32}, 'must be a power of two that divides batch = 16'),
    ({'virtual_shards': 4}, r'virtual_shards = 4 do not divide over 8 device\(s\)'),
  ],
)
def test_what_cannot_be_is_said(tiny, tmp_path, overrides, said):
  with pytest.raises(errors.UserError, match=said):
    train.run(tiny('clm', **{**ASKED, **overrides}), str(tmp_path / 'run'))
  assert not pathlib.Path(tmp_path / 'run' / 'config.json').exists()
