"""Parameters are gathered where they are used, and what travels between devices is no more."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from lmjax import sharding, train
from lmjax.models import heads, layers, shards
from tests.conftest import tpus

SIZES = dict.fromkeys(sharding.MESH_AXES, 1)


def travels(parts, strategy, sizes, **overrides) -> list[str]:
  """The collective operations of a compiled train step."""
  keys = {f'sharding.{axis}': size for axis, size in {**SIZES, **sizes}.items()}
  made = parts('clm', **{'sharding.strategy': strategy, 'model.depth': 1, **keys, **overrides})
  mesh = sharding.make_mesh(made.config['sharding'])
  with jax.set_mesh(mesh), sharding.logical_axes(strategy):
    like, transform, _ = train.init_state(made, mesh)
    text = train.lower(made, mesh, like, transform).compile().as_text()
  assert 'head.loss' in text
  sends = lambda line: (
    re.search(r' (all-|reduce-scatter|collective-)\S*\(', line) and '={{0},' not in line
  )
  return [line for line in text.splitlines() if sends(line)]


@pytest.mark.parametrize('strategy', ['replicate', 'fsdp', 'sequence'])
def test_the_table_travels_once_and_not_in_the_loop_of_the_loss(parts, monkeypatch, strategy):
  """It is gathered for the tokens and the loss together, and so is its gradient summed."""
  monkeypatch.setattr(heads, 'CHUNK', 1 << 12)
  sizes = {'data': 2, 'sequence': 4} if strategy == 'sequence' else {'data': 8}
  lines = travels(parts, strategy, sizes)
  assert not [line for line in lines if 'head.loss/shard_map/while' in line]
  sharded = strategy != 'replicate'
  gathers = [x for x in lines if re.search(r'= f32\[261,\d+\]\S* all-gather\(', x)]
  sums = [x for x in lines if re.search(r'= .*f32\[261,.* (all-reduce|reduce-scatter)\(', x)]
  axes = 2 if strategy == 'sequence' else 1
  assert (len(gathers), len(sums)) == (axes * sharded, axes)


def test_gradients_of_kernels_are_scattered(parts):
  """One reduce-scatter each: four of attention, two of the feed-forward, the table's."""
  lines = travels(parts, 'fsdp', {'data': 8})
  scattered = [x for x in lines if ' reduce-scatter(' in x]
  assert len(scattered) == 7
  whole = [x for x in lines if re.search(r'= f32\[(16|64),(8|16|64)\S* all-reduce\(', x)]
  assert not whole


@pytest.mark.parametrize('step', [1, -1])
@pytest.mark.parametrize(('n', 'dim'), [(2, 0), (4, 1), (8, 0), (8, 1)])
def test_a_ring_scatters_the_sum(n, dim, step):
  """Each device's part of it, as the collective operation has it."""
  mesh = Mesh(jax.devices()[:n], ('d',))
  x = jnp.arange(n * 16 * 24, dtype=jnp.float32).reshape(n, 16, 24) ** 2 % 97
  part = PartitionSpec(*[None] * dim, 'd')
  on = functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec('d'), out_specs=part)
  ring = on(lambda x: shards.ring_scatter(x[0], 'd', dim, step))
  np.testing.assert_array_equal(jax.jit(ring)(x), x.sum(0))


def test_gradients_go_round_between_tpus(parts, monkeypatch):
  """Where a sum of whole kernels and tables would send twice as much."""
  pytest.importorskip('libtpu')
  monkeypatch.setattr(jax, 'devices', lambda: tpus('v5e:2x4'))
  lines = travels(parts, 'fsdp', {'data': 4, 'model': 2}, **{'model.vocab_multiple': 8})
  assert not [x for x in lines if re.search(r'reduce-scatter\(|all-reduce\(.*dot_general', x)]
  # One neighbour, or three others; seven parameters over two axes.
  assert len([x for x in lines if ' collective-permute-start(' in x]) == 7 * (1 + 3)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_gathered_kernels_are_not_kept(parts, monkeypatch, platform):
  """Even where a block keeps all else: four of attention and two more are gathered again."""
  if platform == 'tpu':
    pytest.importorskip('libtpu')
    monkeypatch.setattr(jax, 'devices', lambda: tpus('v5e:2x4'))
  lines = travels(parts, 'fsdp', {'data': 8}, **{'model.depth': 2, 'model.remat': 'none'})
  names = {re.search(r'op_name="([^"]*)"', x)[1] for x in lines if ' all-gather(' in x}
  assert len([name for name in names if re.search('rematted.*all_gather', name)]) == 6


def test_a_frequent_token_gets_its_whole_gradient():
  """In bfloat16, 1,000 times 1 would come to 256."""
  table = jnp.zeros((4, 2), jnp.bfloat16)
  ids = jnp.zeros((10, 100), jnp.int32)
  _, back = jax.vjp(lambda table: layers._rows(table, ids), table)
  (gradient,) = back(jnp.ones((10, 100, 2), jnp.bfloat16))
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_array_equal(gradient[0], [1000, 1000])


def test_rows_that_do_not_divide_are_left_to_the_compiler(parts):
  """As one row of a text that is generated is."""
  made = parts('clm')
  mesh = sharding.make_mesh()
  batch = {key: np.ones((3, *x.shape[1:]), x.dtype) for key, x in made.abstract_batch().items()}
  apply = lambda params, batch: made.model.apply({'params': params}, batch, train=False)[0]['clm']
  params = train.init_state(made, mesh)[2]().params
  expected = jax.jit(apply)(params, batch)
  with jax.set_mesh(mesh), sharding.logical_axes('fsdp'):
    got = jax.jit(apply)(params, batch)
  np.testing.assert_allclose(got.total, expected.total, rtol=1e-6)


def test_nothing_is_left_to_the_compiler_where_it_has_nothing_to_decide(parts):
  """An axis of one device that is left to it makes its programs worse (see shards.on_rows)."""
  made = parts('clm', **{'sharding.strategy': 'fsdp'})
  apply = lambda params, batch: made.model.apply({'params': params}, batch, train=False)
  params = nn.unbox(made.boxed_shapes)
  with jax.set_mesh(sharding.make_mesh(SIZES | {'data': 8})), sharding.logical_axes('fsdp'):
    text = jax.jit(apply).lower(params, made.abstract_batch()).as_text()
  manual = {
    frozenset(re.findall(r'"(\w+)"', axes)) for axes in re.findall('manual_axes={(.*?)}', text)
  }
  assert manual == {frozenset(sharding.MESH_AXES)}
