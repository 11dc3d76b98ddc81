"""One number for the bits of an array, on any mesh; and no single bit that it does not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmjax import fingerprint

ARRAYS = {
  'float32': np.linspace(-3, 3, 48, dtype=np.float32).reshape(8, 6),
  'bfloat16': jnp.linspace(-3, 3, 48, dtype=jnp.bfloat16).reshape(8, 2, 3),
  'int32': np.arange(8, dtype=np.int32),
  'int8': np.arange(-8, 8, dtype=np.int8),
  'bool': np.arange(16) % 3 == 0,
  'scalar': np.float32(1.5),
}


def of(x) -> str:
  return fingerprint.of({'x': x})['x']


@pytest.mark.parametrize('name', ARRAYS)
def test_the_same_on_any_mesh(name):
  x = jnp.asarray(ARRAYS[name])
  found = set()
  for devices in (1, 2, 4, 8):
    mesh = jax.make_mesh(
      (devices,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    for spec in ('data', None) if x.ndim else (None,):
      found.add(
        of(
          jax.device_put(x, NamedSharding(mesh, PartitionSpec(spec) if x.ndim else PartitionSpec()))
        )
      )
  assert found == {of(np.asarray(x))}


@pytest.mark.parametrize('name', ARRAYS)
def test_every_single_bit_counts(name):
  x = np.array(ARRAYS[name])
  width = 1 if x.dtype == bool else 8 * x.itemsize
  found = {of(x)}
  for place in range(x.size):
    for bit in range(width):
      flipped = x.copy()
      np.atleast_1d(flipped).reshape(-1).view(f'uint{8 * x.itemsize}')[place] ^= 1 << bit
      found.add(of(flipped))
  assert len(found) == 1 + x.size * width


def test_places_count():
  x = ARRAYS['float32']
  assert len({of(x), of(x[::-1]), of(x[:, ::-1]), of(np.roll(x, 1))}) == 4


def test_keys_are_their_data():
  key = jax.random.key(3)
  assert of(key) == of(jax.random.key_data(key)) != of(jax.random.key(4))


def test_both_halves_of_wide_numbers_count():
  with jax.enable_x64(True):
    x = np.array([1 << 40, 1, 0])
    assert len({of(x), of(x + (1 << 33)), of(x + 1)}) == 3


def test_pinned():
  """Old checkpoints hold these: when one moves, all of them are taken for damaged."""
  assert of(ARRAYS['float32']) == 'ddb7f8d8f19eef23'
  assert of(ARRAYS['bfloat16']) == '556301d0f860fece'
  assert of(jax.random.key(0)) == '92ca2f0e327c9d94'
  assert fingerprint.together({'b': 'cd', 'a': 'ab'}) == 'e3096660248d1afc'


def test_together_knows_names_and_no_order():
  one = fingerprint.together({'a': '1', 'b': '2'})
  assert one == fingerprint.together({'b': '2', 'a': '1'})
  assert one != fingerprint.together({'b': '1', 'a': '2'})
