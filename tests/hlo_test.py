"""What is read from compiled programs is what they do: exact where it can be known by hand."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmjax.hlo import buffers, facts
from lmjax.hlo.costs import Program
from lmjax.hlo.text import Array, parse
from tests.conftest import tpus

DEVICES = {'cpu': lambda: jax.devices()[:8], 'tpu': lambda: tpus('v5e:2x4')}
on_both = pytest.mark.parametrize('platform', DEVICES)


def mesh_of(platform: str, **sizes: int) -> Mesh:
  devices = np.array(DEVICES[platform]()[: math.prod(sizes.values())]).reshape(*sizes.values())
  return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def compiled(function, mesh, *shapes, axes=()):
  place = NamedSharding(mesh, PartitionSpec(axes))
  args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(*args).compile()


def program(*args, **kwargs) -> Program:
  return Program(compiled(*args, **kwargs).as_text())


def total(costs) -> float:
  return sum(cost.total for cost in costs)


PRODUCTS = {  # name -> (function, shapes, FLOPs)
  'matrices': (lambda x, y: x @ y, [(256, 384), (384, 128)], 2 * 256 * 384 * 128),
  'a batch of them': (lambda x, y: x @ y, [(4, 256, 384), (4, 384, 128)], 8 * 256 * 384 * 128),
  'two dims contracted': (
    lambda x, y: jnp.einsum('bnh,nhd->bd', x, y),
    [(256, 4, 64), (4, 64, 128)],
    2 * 256 * 256 * 128,
  ),
  'a gradient': (
    jax.grad(lambda x, y: jnp.sum((x @ y) ** 2), (0, 1)),
    [(256, 384), (384, 128)],
    6 * 256 * 384 * 128,
  ),
  'loops in loops': (
    lambda x, y: jax.lax.fori_loop(
      0, 5, lambda _, x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ y), x), x
    ),
    [(256, 128), (128, 128)],
    15 * 2 * 256 * 128 * 128,
  ),
  'a scan over a stack': (
    lambda x, ys: jax.lax.scan(lambda x, y: (jnp.sin(x @ y), None), x, ys)[0],
    [(256, 128), (7, 128, 128)],
    7 * 2 * 256 * 128 * 128,
  ),
}


@on_both
@pytest.mark.parametrize('name', PRODUCTS)
def test_products_are_counted_with_their_loops(platform, name):
  function, shapes, flops = PRODUCTS[name]
  assert total(program(function, mesh_of(platform, d=1), *shapes).products) == flops


@pytest.mark.parametrize('groups', [{'batch_group_count': 4}, {'feature_group_count': 4}])
def test_convolutions_in_groups(groups):
  """Beside XLA's count, which is right where there is no loop."""
  kernel = (3, 16, 8) if 'batch_group_count' in groups else (3, 4, 8)
  convolve = lambda x, k: jax.lax.conv_general_dilated(
    x, k, (1,), [(1, 1)], dimension_numbers=('NHC', 'HIO', 'NHC'), **groups
  )
  c = compiled(convolve, mesh_of('cpu', d=1), (8, 6, 16), kernel)
  assert total(Program(c.as_text()).products) == c.cost_analysis()['flops']


COLLECTIVES = {  # name -> (on shards of [1024, 128], bytes sent by one of n devices)
  'all-gather': (lambda x: jax.lax.all_gather(x, 'a', tiled=True), lambda size, n: size * (n - 1)),
  'all-reduce': (lambda x: jax.lax.psum(x, 'a'), lambda size, n: 2 * size * (n - 1) / n),
  'reduce-scatter': (
    lambda x: jax.lax.psum_scatter(x, 'a', tiled=True),
    lambda size, n: size * (n - 1) / n,
  ),
  'all-to-all': (
    lambda x: jax.lax.all_to_all(x, 'a', 0, 0, tiled=True),
    lambda size, n: size * (n - 1) / n,
  ),
  'collective-permute': (
    lambda x: jax.lax.ppermute(x, 'a', [(i, (i + 1) % 4) for i in range(4)]),
    lambda size, n: size,
  ),
}


@on_both
@pytest.mark.parametrize('name', COLLECTIVES)
def test_collectives_are_bytes_on_the_wire(platform, name):
  """In a loop, along the second of two axes of a mesh."""
  function, sent = COLLECTIVES[name]
  mesh, shape = mesh_of(platform, b=2, a=4), (1024, 128)
  whole = (shape[0] * 8, shape[1])

  @functools.partial(
    jax.shard_map,
    in_specs=PartitionSpec(('b', 'a')),
    out_specs=PartitionSpec(('b', 'a')),
    check_vma=False,
  )
  def run(x):
    return jax.lax.fori_loop(
      0, 3, lambda i, x: jnp.sin(function(x + i)[: len(x) // 4].repeat(4, 0)), x
    )

  found = program(run, mesh, whole, axes=('b', 'a')).collectives
  kinds = collections.Counter()
  for cost in found:
    kinds[cost.kind] += cost.total
    assert cost.group == tuple(range(2 if cost.kind == 'collective-permute' else 4))
  assert kinds == {name: 3 * sent(4 * math.prod(shape), 4)}


def test_what_slices_send_each_other_is_no_collective_and_counted():
  """The compiler leaves it to the hosts."""
  devices = np.array(tpus('v5e:2x2@2')).reshape(2, 4)
  mesh = Mesh(devices, ('slice', 'd'), axis_types=(AxisType.Auto,) * 2)
  f = jax.shard_map(
    lambda x: jax.lax.psum(x, 'slice'),
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  (found,) = program(f, mesh, (1024, 128)).collectives
  assert (found.kind, found.amount, found.group) == ('all-reduce', 4 * 1024 * 128, (0, 4))


# As the compiler for GPUs writes it: several at once, begun and awaited.
BEGUN = """HloModule m, is_scheduled=true, num_partitions=4
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (a: f32[4,8], b: f32[16]) -> (f32[4,8], f32[16]) {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %ag = ((f32[4,8]{1,0}, f32[16]{0}), (f32[16,8]{1,0}, f32[64]{0})) all-gather-start(%a, %b), replica_groups={{0,1,2,3}}, dimensions={0}
  %agd = (f32[16,8]{1,0}, f32[64]{0}) all-gather-done(%ag)
  %p = f32[16,8]{1,0} get-tuple-element(%agd), index=0
  %q = f32[64]{0} get-tuple-element(%agd), index=1
  %ar = (f32[16,8]{1,0}, f32[64]{0}) all-reduce-start(%p, %q), replica_groups=[1,4]<=[4], to_apply=%add
  %ard = (f32[16,8]{1,0}, f32[64]{0}) all-reduce-done(%ar)
  %r = f32[16,8]{1,0} get-tuple-element(%ard), index=0
  %s = f32[64]{0} get-tuple-element(%ard), index=1
  %rs = ((f32[16,8]{1,0}, f32[64]{0}), (f32[4,8]{1,0}, f32[16]{0})) reduce-scatter-start(%r, %s), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
  ROOT %rsd = (f32[4,8]{1,0}, f32[16]{0}) reduce-scatter-done(%rs)
}
"""  # noqa: E501


def test_collectives_that_are_begun_and_awaited_are_counted_once():
  size = 4 * (16 * 8 + 64)
  found = {cost.kind: cost.total for cost in Program(BEGUN).collectives}
  shares = {'all-gather': 0.75, 'all-reduce': 1.5, 'reduce-scatter': 0.75}
  assert found == {kind: size * share for kind, share in shares.items()}
  # A quarter and the whole, the whole twice in the sum, and flags are no data.
  moved = {cost.kind: cost.total for cost in Program(BEGUN).moves}
  assert moved == {
    'all-gather-start': 1.25 * size,
    'all-reduce-start': 2 * size,
    'reduce-scatter-start': 1.25 * size,
  }
  # Gathered, and summed in place; what is returned lies where the caller wants it.
  assert [b.array.dims for b in buffers.at_peak(BEGUN)] == [(16, 8), (64,)]


@on_both
def test_moves_are_operands_and_results(platform):
  """A sum reads two and writes one; a loop over a stack reads each of its parts once."""
  mesh, size = mesh_of(platform, d=1), 4 * 4096 * 1024
  assert total(program(lambda x, y: x + y, mesh, *[(4096, 1024)] * 2).moves) == 3 * size
  stacked = lambda ys: jax.lax.fori_loop(0, 8, lambda i, ys: ys.at[i].set(jnp.sin(ys[i])), ys)
  moved = total(program(stacked, mesh, (8, 4096, 1024)).moves)
  assert 2 * 8 * size <= moved <= 4.1 * 8 * size  # with a copy of what is not donated


@on_both
def test_the_largest_buffers_are_those_that_the_backward_pass_needs(platform):
  """What a scan keeps for its gradient, and about as much memory as the compiler says."""

  def loss(x, ys):
    body = lambda x, y: (jnp.sin(x @ y), None)
    return jnp.sum(jax.lax.scan(body, x, ys)[0] ** 2)

  c = compiled(jax.grad(loss), mesh_of(platform, d=1), (8192, 1024), (12, 1024, 1024))
  found = buffers.at_peak(c.as_text())
  assert found[0].array.dims == (12, 8192, 1024)
  assert 'while/body' in found[0].where  # and not what made the zeros that it was at first
  peak, temporaries = sum(b.bytes for b in found), c.memory_analysis().temp_size_in_bytes
  assert 0.8 * temporaries < peak < 1.25 * temporaries


def test_a_loop_that_nobody_can_count_is_said_to_be():
  """Its counter begins with an argument."""
  text = """HloModule open

%body (x: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %x = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %a = f32[8,8]{1,0} get-tuple-element(%x), index=1
  %b = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %y = (s32[], f32[8,8]{1,0}) tuple(%i, %b)
}

%cond (x: (s32[], f32[8,8])) -> pred[] {
  %x = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %n = s32[] constant(12)
  %m = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %t = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,8]{1,0}) while(%t), condition=%cond, body=%body
}
"""
  found = Program(text)
  assert found.uncounted == ['loop']
  assert total(found.products) == 2 * 8**3


def test_what_is_called_in_the_meantime_is_counted():
  """As collectives of a tpu7x are."""
  text = """HloModule called, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%called (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  ROOT %ar = f32[16]{0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %s = ((f32[16]{0}), f32[16]{0}) call-start(%a), to_apply=%called
  ROOT %d = f32[16]{0} call-done(%s)
}
"""
  (cost,) = Program(text).collectives
  assert cost.total == 2 * 0.75 * 64


def test_a_permutation_is_what_is_sent_between_those_that_differ():
  """Of two arrays, when the first device keeps its own."""
  text = """HloModule two, num_partitions=4

ENTRY %main (a: f32[4,8], b: f32[16]) -> (f32[4,8], f32[16]) {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %p = ((f32[4,8]{1,0}, f32[16]{0}), (f32[4,8]{1,0}, f32[16]{0}), u32[], u32[]) collective-permute-start(%a, %b), source_target_pairs={{0,0},{1,2},{2,3},{3,1}}
  ROOT %d = (f32[4,8]{1,0}, f32[16]{0}) collective-permute-done(%p)
}
"""  # noqa: E501
  (cost,) = Program(text).collectives
  assert (cost.total, cost.group) == (4 * (32 + 16), (1, 2))
  assert total(Program(text).moves) == 2 * 4 * (32 + 16)


@pytest.mark.parametrize(('step', 'turns'), [(1, 11), (2, 6)])
def test_turns_of_a_loop_that_the_compiler_changed(step, turns):
  """The first stands before it, as where slices send each other something, or two are made one."""
  text = """HloModule peeled

%body (x: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %x = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %a = f32[8,8]{1,0} get-tuple-element(%x), index=1
  %by = s32[] constant(STEP)
  %next = s32[] add(%i, %by)
  %b = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %y = (s32[], f32[8,8]{1,0}) tuple(%next, %b)
}

%cond (x: (s32[], f32[8,8])) -> pred[] {
  %x = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,8]) -> (s32[], f32[8,8]) {
  %a = f32[8,8]{1,0} parameter(0)
  %first = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one = s32[] constant(1)
  %begin = s32[] copy(%one)
  %t = (s32[], f32[8,8]{1,0}) tuple(%begin, %first)
  ROOT %loop = (s32[], f32[8,8]{1,0}) while(%t), condition=%cond, body=%body
}
"""
  found = Program(text.replace('STEP', str(step)))
  assert not found.uncounted
  assert total(found.products) == (1 + turns) * 2 * 8**3


def test_memory_of_a_tpu_is_what_its_arrays_need(tmp_path):
  """Of six blocks computed again: their inputs, one with its gradient, and its hidden layer."""
  pytest.importorskip('libtpu')
  rows, dim, hidden, depth = 16384, 1024, 4096, 6
  place = NamedSharding(mesh_of('tpu', d=1), PartitionSpec())
  shapes = [(rows, dim), (depth, dim, hidden), (depth, hidden, dim)]
  args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]

  @jax.checkpoint
  def block(x, w):
    return x + jnp.tanh(x @ w[0]) @ w[1], None

  loss = lambda x, *w: jnp.sum(jax.lax.scan(block, x, w)[0] ** 2)
  found = facts.of(jax.jit(jax.grad(loss, (1, 2))).lower(*args), 'v5e:1x1', str(tmp_path))
  ours = 4 * rows * ((depth + 2) * dim + hidden)
  assert found['arguments'] == sum(4 * math.prod(shape) for shape in shapes)
  assert ours <= found['temporaries'] <= 1.1 * ours  # the sum in memory_analysis() is 1.37


def test_arrays_fill_whole_tiles():
  assert Array('bf16', (4, 100, 64), '{2,1,0:T(8,128)(2,1)}').padded == 4 * 104 * 128 * 2
  assert Array('f32', (64, 100), '{0,1:T(8,128)}').padded == 128 * 104 * 4
  assert Array('f32', (1000,), '{0:T(1024)S(1)}').padded == 4096
  assert Array('f32', (1000,), '{0:T(1024)S(1)}').space == 1
  assert Array('pred', (3, 5), '{1,0}').bytes == 15


def test_every_instruction_is_read():
  text = compiled(lambda x: jnp.sort(x @ x.T), mesh_of('cpu', d=1), (64, 64)).as_text()
  computations, entry = parse(text)
  assert entry in computations
  lines = [line for line in text.splitlines() if ' = ' in line and line.startswith('  ')]
  assert sum(map(len, computations.values())) == len(lines)
