"""Copies on the hosts: all that there was, nothing twice, and out of reach of the next step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmjax import offload

# Shape, how the devices hold it, and how many of eight copies of an element may go to the hosts.
CASES = [
  ((16, 24), PartitionSpec(), 1),
  ((7, 24), PartitionSpec(), 1),
  ((16, 3), PartitionSpec('data'), 1),
  ((6, 3), PartitionSpec('data'), 4),
  ((8, 8), PartitionSpec('data', 'model'), 1),
  ((8, 5), PartitionSpec(('data', 'model')), 1),
  ((8, 5), PartitionSpec(None, None), 1),
  ((4,), PartitionSpec(), 4),
  ((3, 5), PartitionSpec(), 8),
  ((), PartitionSpec(), 8),
]


@pytest.fixture(scope='module')
def mesh():
  return jax.make_mesh((2, 4, 1), ('data', 'model', 'idle'), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'uint32'])
def test_no_element_travels_twice_where_the_shape_divides(mesh, dtype):
  arrays = {
    str(i): jax.device_put(
      jnp.arange(np.prod(shape)).reshape(shape).astype(dtype), NamedSharding(mesh, spec)
    )
    for i, (shape, spec, _) in enumerate(CASES)
  }
  copies = offload.copied(arrays)
  assert list(copies) == list(arrays)
  for (_, _, times), x, copy in zip(CASES, arrays.values(), copies.values(), strict=True):
    assert {shard.data.sharding.memory_kind for shard in copy.addressable_shards} == {'pinned_host'}
    np.testing.assert_array_equal(np.asarray(copy), np.asarray(x), strict=True)
    assert sum(shard.data.size for shard in copy.addressable_shards) == times * x.size


def test_the_originals_may_be_given_away(mesh):
  x = jax.device_put(jnp.zeros((1024, 1024)), NamedSharding(mesh, PartitionSpec('data')))
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = step(x)
  copies = []
  for _ in range(5):
    copies.append(offload.copied({'x': x})['x'])
    x = step(x)
  for i, copy in enumerate(copies):
    np.testing.assert_array_equal(np.asarray(copy), i + 1.0)


def test_nothing_is_sent_between_devices(mesh):
  x = {'x': jax.device_put(jnp.zeros((64, 64)), NamedSharding(mesh, PartitionSpec('data')))}
  place = offload.copied(x)['x'].sharding
  text = offload._program((place,)).lower(tuple(x.values())).compile().as_text()
  assert 'pinned' in str(place)
  assert not [word for word in ('all-', 'collective', 'permute') if word in text]


def test_one_device():
  x = jnp.arange(6.0)
  copy = offload.copied({'x': x})['x']
  assert copy.sharding.memory_kind == 'pinned_host'
  np.testing.assert_array_equal(np.asarray(copy), np.asarray(x))
