"""Who sees whom, for every kind of positions; and the parts of the Transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lmjax import models
from lmjax.models import layers
from lmjax.models.attention import Mask, attention, reference
from lmjax.models.positions import POSITIONS

L, D = 12, 16
every_position = pytest.mark.parametrize('positions', POSITIONS)


def core(**overrides):
  settings = dict(depth=2, dim=D, heads=4, max_length=L, initializer='fan_in')
  return models.get('transformer', **settings | overrides)


def apply(module, x_BLD, mask, positions_BL=None):
  """(output, the function of x) with wide random parameters, so that nothing is hidden."""
  init = lambda: nn.unbox(module.init(jax.random.key(1), x_BLD, mask, False))
  rng = np.random.default_rng(0)
  wide = lambda p: jnp.asarray(rng.normal(size=p.shape) / np.sqrt(p.shape[-1]), jnp.float32)
  params = jax.tree.map(wide, jax.eval_shape(init))
  run = jax.jit(lambda x: module.apply(params, x, mask, False, positions_BL))
  return run(x_BLD), run


def inputs(batch=2):
  return jax.random.normal(jax.random.key(0), (batch, L, D))


def moved(run, x_BLD, place) -> np.ndarray:
  """bool[L]: the outputs that change when the input at a place does."""
  other = jax.random.normal(jax.random.key(9), (D,))  # a constant would be lost in the norm
  before, after = run(x_BLD), run(x_BLD.at[:, place].add(other[None]))
  return np.asarray(jnp.abs(after - before).max(axis=(0, 2)) > 1e-5)


@every_position
def test_causal_means_later_tokens_do_not_move_earlier_outputs(positions):
  x_BLD = inputs()
  _, run = apply(core(positions=positions), x_BLD, Mask(causal=True))
  np.testing.assert_array_equal(moved(run, x_BLD, 5), np.arange(L) >= 5)


@every_position
def test_bidirectional_means_every_token_moves_every_output(positions):
  x_BLD = inputs()
  _, run = apply(core(positions=positions), x_BLD, Mask(causal=False))
  assert moved(run, x_BLD, 5).all()


@pytest.mark.parametrize('causal', [True, False])
@every_position
def test_segments_do_not_see_each_other_and_padding_is_not_seen(positions, causal):
  segments_BL = jnp.array([[1] * 4 + [2] * 5 + [0] * 3] * 2)
  x_BLD = inputs()
  _, run = apply(core(positions=positions), x_BLD, Mask(causal, segments_BL))
  outside_first = moved(run, x_BLD, 1)[4:9]
  outside_second = moved(run, x_BLD, 5)[:4]
  from_padding = moved(run, x_BLD, 10)[:9]
  assert not outside_first.any()
  assert not outside_second.any()
  assert not from_padding.any()
  assert moved(run, x_BLD, 1)[1:4].all()


@every_position
def test_a_segment_is_what_it_would_be_alone(positions):
  """Packing changes nothing where positions restart."""
  x_BLD = inputs()
  lengths = (4, 8)
  segments_BL = jnp.array([[1] * 4 + [2] * 8] * 2)
  positions_BL = jnp.array([[*range(4), *range(8)]] * 2)
  packed, _ = apply(core(positions=positions), x_BLD, Mask(True, segments_BL), positions_BL)
  module, start = core(positions=positions), 0
  for n in lengths:
    alone, _ = apply(module, x_BLD[:, start : start + n], Mask(causal=True))
    np.testing.assert_allclose(packed[:, start : start + n], alone, atol=2e-5)
    start += n


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('window', [0, 3])
@pytest.mark.parametrize('arrays', [(), ('segments',), ('lengths',), ('prefix',), 'all'])
def test_a_mask_is_what_it_says(causal, window, arrays):
  """Place by place, in words."""
  rows, arrays = 2, ('segments', 'lengths', 'prefix') if arrays == 'all' else arrays
  segments = np.array([[1] * 4 + [2] * 6 + [0] * 2, [1] * 12])
  lengths, prefix = np.array([9, 12]), np.array([5, 0])
  expected = np.ones((rows, L, L), bool)
  for row, query, key in np.ndindex(rows, L, L):
    seen = not causal or key <= query or ('prefix' in arrays and key < prefix[row])
    seen &= not window or abs(query - key) < window
    if 'segments' in arrays:
      seen &= segments[row, query] == segments[row, key] != 0
    if 'lengths' in arrays:
      seen &= max(query, key) < lengths[row]
    expected[row, query, key] = seen
  mask = Mask(
    causal,
    segments_BL=segments if 'segments' in arrays else None,
    lengths_B=lengths if 'lengths' in arrays else None,
    prefix_B=prefix if 'prefix' in arrays else None,
    window=window,
  )
  got = mask.array(L, L)
  np.testing.assert_array_equal(np.broadcast_to(got, expected.shape), expected)


def test_window_limits_distance():
  x_BLD = inputs()
  _, run = apply(core(depth=1, window=3, positions='none'), x_BLD, Mask(causal=True))
  np.testing.assert_array_equal(np.flatnonzero(moved(run, x_BLD, 4)), [4, 5, 6])
  _, run = apply(core(depth=1, window=3, positions='none'), x_BLD, Mask(causal=False))
  np.testing.assert_array_equal(np.flatnonzero(moved(run, x_BLD, 4)), [2, 3, 4, 5, 6])


@pytest.mark.parametrize('positions', [p for p in POSITIONS if p != 'none'])
def test_positions_tell_word_order(positions):
  """Without a causal mask a core that knows no positions commutes with permutations."""
  x_BLD, order = inputs(), np.random.default_rng(0).permutation(L)
  for name, same in ((positions, False), ('none', True)):
    y_BLD, run = apply(core(positions=name), x_BLD, Mask(causal=False))
    assert np.allclose(run(x_BLD[:, order]), y_BLD[:, order], atol=1e-4) == same


@pytest.mark.parametrize('positions', ['rotary', 'alibi', 'relative', 'none'])
def test_relative_positions_do_not_notice_a_shift(positions):
  x_BLD, mask = inputs(), Mask(causal=True)
  here, _ = apply(core(positions=positions), x_BLD, mask, jnp.arange(L)[None])
  there, _ = apply(core(positions=positions), x_BLD, mask, 7 + jnp.arange(L)[None])
  np.testing.assert_allclose(here, there, atol=1e-4)


def test_grouped_queries_are_repeated_keys():
  rng = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(rng[0], (2, L, 4, 8))
  k, v = (jax.random.normal(r, (2, L, 2, 8)) for r in rng[1:])
  mask = Mask(causal=True)
  repeat = lambda x: jnp.repeat(x, 2, axis=2)
  np.testing.assert_allclose(
    attention(q, k, v, mask), attention(q, repeat(k), repeat(v), mask), atol=1e-6
  )


def test_attention_is_the_formula():
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 1, 5, 1, 4)).astype(np.float32)
  logits = q[0, :, 0] @ k[0, :, 0].T / 2.0
  logits[np.triu_indices(5, 1)] = -np.inf
  weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  got = attention(q, k, v, Mask(causal=True))[0, :, 0]
  np.testing.assert_allclose(got, weights @ v[0, :, 0], atol=1e-6)


def test_a_query_without_keys_gives_zeros_and_finite_gradients():
  q = jnp.ones((1, 3, 2, 4))
  nothing = jnp.zeros((1, 3, 3), bool)
  run = lambda q: reference(q, q, q, nothing)
  assert not run(q).any()
  assert not jax.grad(lambda q: run(q).sum())(q).any()


@pytest.mark.parametrize('ffn', layers.ACTIVATIONS)
@pytest.mark.parametrize('norm_position', ['pre', 'post', 'both'])
@pytest.mark.parametrize('norm', layers.NORMS)
def test_every_composition_runs(ffn, norm_position, norm):
  module = core(depth=1, ffn=ffn, norm_position=norm_position, norm=norm, qk_norm=True, kv_heads=2)
  y_BLD, _ = apply(module, inputs(), Mask(causal=True))
  assert y_BLD.shape == (2, L, D)
  assert bool(jnp.isfinite(y_BLD).all())


def test_bias_off_leaves_no_bias():
  module = core(bias=False, norm='layernorm')
  shapes = jax.eval_shape(
    lambda: module.init(jax.random.key(0), inputs(), Mask(causal=True), False)
  )
  paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(shapes)]
  assert paths
  assert not [p for p in paths if 'bias' in p]


def test_bfloat16_stays_near_float32_and_parameters_stay_float32():
  x_BLD, mask = inputs(), Mask(causal=True)
  exact, _ = apply(core(), x_BLD, mask)
  rough, _ = apply(core(dtype='bfloat16'), x_BLD, mask)
  error = float(jnp.abs(exact - rough).max() / jnp.abs(exact).max())
  assert 1e-5 < error < 0.1
  params = core(dtype='bfloat16').init(jax.random.key(0), x_BLD, mask, False)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}


def test_initialisers_are_the_papers():
  def deviations(name, depth):
    module = models.get(
      'transformer', depth=depth, dim=64, heads=4, max_length=64, initializer=name
    )
    x_BLD = jnp.zeros((1, 8, 64))
    params = jax.jit(lambda: nn.unbox(module.init(jax.random.key(0), x_BLD, Mask(True), False)))()
    block = params['params']['blocks']
    return {
      'kernel': float(block['ffn']['up']['kernel'].std()),
      'residual': float(block['ffn']['down']['kernel'].std()),
      'positions': float(params['params']['position']['embed']['table'].std()),
      'largest': float(jnp.abs(block['ffn']['up']['kernel']).max()),
    }

  gpt2, bert = deviations('gpt2', 8), deviations('bert', 8)
  assert gpt2['kernel'] == pytest.approx(0.02, rel=0.03)
  assert gpt2['residual'] == pytest.approx(0.02 / 4, rel=0.03)  # sqrt(2 * 8) = 4
  assert gpt2['positions'] == pytest.approx(0.01, rel=0.05)
  # Cut off at two deviations: 0.0176 is what is left of 0.02.
  assert bert['kernel'] == pytest.approx(0.0176, rel=0.03)
  assert bert['residual'] == pytest.approx(0.0176, rel=0.03)
  assert bert['largest'] <= 0.04


@pytest.mark.parametrize('kv_heads', [4, 2])
def test_weights_can_be_seen_and_are_those_that_mix_the_values(kv_heads):
  made = core(kv_heads=kv_heads, positions='rotary', attention_dropout=0.5)
  mask = Mask(causal=True, segments_BL=jnp.array([[1] * 7 + [2] * 5] * 2))
  x_BLD = inputs()
  params = nn.unbox(made.init(jax.random.key(1), x_BLD, mask, False))
  some = lambda module, _: module.name in ('value', 'out')
  asked = {'mutable': ['intermediates'], 'capture_intermediates': some}
  y_BLD, seen = jax.jit(lambda p: made.apply(p, x_BLD, mask, False, **asked))(params)
  plain_BLD = jax.jit(lambda p: made.apply(p, x_BLD, mask, False))(params)
  np.testing.assert_allclose(y_BLD, plain_BLD, rtol=1e-6, atol=1e-6)
  ((name, blocks),) = seen['intermediates'].items()
  of = blocks['attention']
  (weights,), (values,), (out,) = of['weights'], of['value']['__call__'], of['out']['__call__']
  assert weights.shape == (2, 2, 4, L, L)  # layers, rows, heads, queries, keys
  allowed = np.asarray(mask.array(L, L))
  assert not np.asarray(weights)[:, ~np.broadcast_to(allowed[:, None], (2, 4, L, L))].any()
  np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
  shared = jnp.repeat(values, 4 // kv_heads, axis=3)
  mixed = jnp.einsum('dbnls,dbsnh->dblnh', weights, shared)
  own = params['params'][name]['attention']['out']
  expected = jnp.einsum('dblnh,dnhe->dble', mixed, own['kernel']) + own['bias'][:, None, None]
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
