"""Every kernel computes what the reference does, on shards too; and the right one is chosen."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding

from lmjax import sharding
from lmjax.data import loader
from lmjax.errors import UserError
from lmjax.models import attention as attention_lib
from lmjax.models import flash, products, shards
from lmjax.models.attention import Mask, attention, reference
from tests.conftest import tpus

B, L, N, G, H = 2, 512, 4, 2, 16
SEGMENTS = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], L // 4, axis=1)
LENGTHS = np.array([1, 300])

# What the structure of a mask can be: name -> Mask of arrays of L.
MASKS = {
  'bidirectional': Mask(causal=False),
  'causal': Mask(causal=True),
  'sliding window': Mask(causal=True, window=100),
  'bidirectional window': Mask(causal=False, window=100),
  'window of everything': Mask(causal=False, window=L),
  'segments': Mask(causal=False, segments_BL=SEGMENTS),
  'causal segments': Mask(causal=True, segments_BL=SEGMENTS),
  'causal segments, window': Mask(causal=True, window=100, segments_BL=SEGMENTS),
  'padding': Mask(causal=False, lengths_B=LENGTHS),
  'causal padding': Mask(causal=True, lengths_B=LENGTHS),
  'prefix': Mask(causal=True, prefix_B=np.array([9, 200])),
}
STRATEGIES = {
  'fsdp': {'data': 2},
  'tensor': {'data': 2, 'model': 2},
  'sequence': {'data': 2, 'sequence': 4},
}
SHARDED = [
  ('splash', 'fsdp', 'causal segments, window'),
  ('splash', 'tensor', 'padding'),
  ('splash', 'sequence', 'bidirectional'),
  ('splash', 'sequence', 'causal'),
  ('splash', 'sequence', 'causal segments, window'),
  ('splash', 'sequence', 'padding'),
  ('triton', 'fsdp', 'causal segments'),
  ('triton', 'tensor', 'bidirectional'),
]
STAND_IN = {  # a kernel as it can be run on a CPU
  'splash': lambda q, k, v, m: flash.splash(
    q, k, v, m.causal, m.window, m.segments(q.shape[1]), interpret=True
  ),
  'triton': lambda q, k, v, m: flash.triton(
    q, k, v, m.causal, m.segments(q.shape[1]), interpret=True
  ),
}


@pytest.fixture(scope='module')
def qkvy():
  """Queries, keys, values, and the gradient of the output."""
  keys = jax.random.split(jax.random.key(0), 4)
  return [jax.random.normal(k, (B, L, n, H)) for k, n in zip(keys, (N, G, G, N), strict=True)]


def claims(name: str) -> list[str]:
  known = flash.KERNELS[name].masks
  return [mask for mask in MASKS if all(kind in known for kind in MASKS[mask].kinds)]


def compare(kernel, mask, qkvy, strategy='replicate', sizes=None, atol=1e-5):
  """Output and gradients of a kernel beside the reference's."""
  *qkv, dy = qkvy

  def pull(function):
    def run(q, k, v):
      y, back = jax.vjp(function, q, k, v)
      return y, *back(dy.astype(y.dtype))

    return run

  sizes = {axis: (sizes or {}).get(axis, 1) for axis in sharding.MESH_AXES}
  mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
  expected = jax.jit(pull(lambda q, k, v: reference(q, k, v, mask.array(L, L))))(*qkv)
  with jax.set_mesh(mesh), sharding.logical_axes(strategy):
    got = jax.jit(pull(lambda q, k, v: kernel(q, k, v)))(*qkv)
  for a, b, what in zip(got, expected, ('y', 'dq', 'dk', 'dv'), strict=True):
    np.testing.assert_allclose(a, b, atol=atol, err_msg=what)


@pytest.fixture
def stand_in(monkeypatch):
  """The kernels of a platform, interpreted, on these devices."""

  def replace(name):
    monkeypatch.setattr(products, 'platform', lambda: flash.KERNELS[name].platform)
    kernel = flash.KERNELS[name]
    kernel = dataclasses.replace(kernel, call=STAND_IN[name], dtypes=('float32',))
    monkeypatch.setitem(flash.KERNELS, name, kernel)

  return replace


@pytest.mark.parametrize(('name', 'mask'), [(n, m) for n in STAND_IN for m in claims(n)])
def test_kernel_is_the_reference(qkvy, stand_in, name, mask):
  stand_in(name)
  compare(functools.partial(attention, mask=MASKS[mask], backend=name), MASKS[mask], qkvy)


@pytest.mark.parametrize(('name', 'strategy', 'mask'), SHARDED)
def test_kernel_is_the_reference_on_shards(qkvy, stand_in, name, strategy, mask):
  stand_in(name)
  run = functools.partial(attention, mask=MASKS[mask], backend=name)
  compare(run, MASKS[mask], qkvy, strategy, STRATEGIES[strategy])


@pytest.mark.parametrize('mask', claims('cudnn'))
def test_cudnn_is_asked_for_the_right_thing(qkvy, monkeypatch, mask):
  """Without a GPU: jax.nn's own plain implementation, with the arguments that cuDNN gets."""
  plain = jax.nn.dot_product_attention
  asked = []

  def instead(*args, implementation, **kwargs):
    asked.append(implementation)
    return plain(*args, implementation='xla', **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', instead)
  m = MASKS[mask]

  def run(q, k, v):
    y = flash.KERNELS['cudnn'].call(q, k, v, m)
    real = jnp.ones((B, L)) if m.lengths_B is None else m.segments(L)
    return jnp.where(real[:, :, None, None] > 0, y, 0)

  compare(run, m, qkvy)
  compare(run, m, qkvy, 'tensor', STRATEGIES['tensor'])
  assert set(asked) == {'cudnn'}


def test_every_shard_of_a_causal_mask_has_the_same_work():
  """Shard d works on the pieces d and 2n - 1 - d: what it sees does not depend on d."""
  for ways in (2, 4, 8):
    seen = flash._dealt(L, ways).reshape(ways, -1)
    assert sorted(seen.ravel()) == list(range(L))
    assert len(set(seen.sum(axis=1))) == 1


@pytest.mark.parametrize(('strategy', 'mask'), [case[1:] for case in SHARDED if 'splash' in case])
def test_splash_compiles_for_a_tpu(strategy, mask):
  """In bfloat16, forward and backward, with heads of 64 dims, for a v5e that is not there."""
  sizes = {axis: STRATEGIES[strategy].get(axis, 1) for axis in sharding.MESH_AXES}
  mesh, m = sharding.make_mesh(sizes, tpus('v5e:2x4')[: math.prod(sizes.values())]), MASKS[mask]
  with jax.set_mesh(mesh), sharding.logical_axes(strategy):
    run = lambda q, k, v: attention(q, k, v, m).astype(jnp.float32).sum()
    q, k = (
      jax.ShapeDtypeStruct(
        (B, L, n, 64), jnp.bfloat16, sharding=NamedSharding(mesh, shards.spec(*names))
      )
      for n, names in ((N, flash.QUERY), (G, flash.KEY))
    )
    program = jax.jit(jax.grad(run, (0, 1, 2))).lower(q, k, k).compile().as_text()
  assert program.count('custom_call_target="tpu_custom_call"') == 2
  rows = L // STRATEGIES[strategy].get('sequence', 1)
  assert f'{rows},{L}]' not in program  # no square of logits


CHOICES = {
  # platform, what differs from an easy case -> what is chosen and why
  'cpu': ('cpu', {}, 'reference', 'no kernel runs on cpu'),
  'tpu': ('tpu', {}, 'splash', 'of tpu'),
  'gpu': ('gpu', {}, 'cudnn', 'of gpu'),
  'documents on a GPU': (
    'gpu',
    {'masks': ('segments',)},
    'triton',
    'cudnn has no mask for segments',
  ),
  'float32 on a GPU': ('gpu', {'dtype': 'float32'}, 'reference', 'does not compute in float32'),
  'dropout': ('tpu', {'dropout': True}, 'reference', 'no dropout'),
  'bias': ('tpu', {'bias': True}, 'reference', 'adds nothing to the logits'),
  'generation': ('tpu', {'cache': True}, 'reference', 'no cache'),
  'prefix': ('tpu', {'masks': ('causal', 'prefix')}, 'reference', 'no mask for prefix'),
  'short': ('tpu', {'length': 100}, 'reference', 'multiple of 128, not 100'),
  'odd length': ('gpu', {'length': 1023}, 'reference', 'cudnn takes lengths of a multiple of 2'),
  'wide heads': ('gpu', {'head_dim': 160}, 'reference', 'up to 128 dims, not 160'),
  'odd heads': ('gpu', {'head_dim': 20}, 'triton', 'multiple of 8 dims, not 20'),
}


@pytest.mark.parametrize('case', CHOICES)
def test_choice_and_reason(monkeypatch, case):
  platform, differs, name, why = CHOICES[case]
  monkeypatch.setattr(products, 'platform', lambda: platform)
  asked = dict(masks=('causal',), dtype='bfloat16', head_dim=64, length=1024) | differs
  got = flash.choose('auto', **asked)
  assert got[0] == name
  assert why in got[1]
  for kernel in flash.KERNELS:
    if kernel != name and name == 'reference':
      with pytest.raises(UserError, match=f'model.attention = "{kernel}" cannot be: {kernel} '):
        flash.choose(kernel, **asked)


@pytest.mark.parametrize('capability', ['7.5', 'gfx90a', '8.0', '12.0'])
def test_kernels_want_an_nvidia_gpu_of_ampere_or_later(monkeypatch, capability):
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  monkeypatch.setattr(products, 'platform', lambda: 'gpu')
  got = flash.choose('auto', length=1024)
  if capability in ('8.0', '12.0'):
    assert got == ('cudnn', 'of gpu')
  else:
    assert got == ('reference', f'no kernel runs on a GPU of capability {capability}')


def test_a_sharded_length_is_a_reason(monkeypatch):
  monkeypatch.setattr(products, 'platform', lambda: 'gpu')
  with jax.set_mesh(sharding.make_mesh({'sequence': 8})), sharding.logical_axes('sequence'):
    assert flash.choose('auto', length=1024)[0] == 'reference'
    with pytest.raises(UserError, match='cudnn does not shard the length'):
      flash.choose('cudnn', length=1024)
    monkeypatch.setattr(products, 'platform', lambda: 'tpu')
    assert flash.choose('auto', length=1024)[0] == 'splash'
    assert 'multiple of 1024, not 512' in flash.choose('auto', length=512)[1]


def test_the_choice_is_said_once(capsys):
  attention_lib._say.cache_clear()
  q = jnp.ones((1, 4, 1, 2))
  for _ in range(2):
    attention(q, q, q, Mask(causal=True), say=True)
  assert capsys.readouterr().out == 'attention: reference (no kernel runs on cpu)\n'


# ---------------------------------------------------------------------- texts that share a row

PACKED = {
  'clm': ('clm', {'objective.separate_documents': True}),
  'mlm': ('mlm', {'objective.separate_documents': True}),
  'bert': (
    'mlm',
    {'objective.next_sentence': True, 'objective.pairs_per_row': 4, 'objective.pair_length': 40},
  ),
}


def alone(batch, row):
  """(each text of a row as the only one that counts, each as a row of its own)."""
  texts = range(1, batch['segments'][row].max() + 1)
  packed = {key: np.repeat(x[row : row + 1], len(texts), axis=0) for key, x in batch.items()}
  single = {key: np.zeros_like(x) for key, x in packed.items()}
  for i, text in enumerate(texts):
    here = np.flatnonzero(batch['segments'][row] == text)
    for key in batch:
      if f'{key.removesuffix("weights")}places' in batch and key.endswith('weights'):
        places = batch[f'{key.removesuffix("weights")}places'][row]
        packed[key][i] *= np.isin(places, here)
        single[key][i] = packed[key][i]
      elif key.endswith('places'):
        single[key][i] = np.where(np.isin(batch[key][row], here), batch[key][row] - here[0], 0)
      elif batch[key].shape[1] == L // 4:  # of each token
        single[key][i, : len(here)] = batch[key][row, here]
        packed[key][i] *= np.isin(np.arange(L // 4), here) if key == 'weights' else 1
      else:  # targets of places
        single[key][i] = batch[key][row]
  return packed, single


@pytest.mark.parametrize('name', ['reference', *STAND_IN])
@pytest.mark.parametrize('objective', PACKED)
def test_a_text_has_the_same_loss_alone_and_packed(parts, stand_in, objective, name):
  if name != 'reference':
    stand_in(name)
  which, own = PACKED[objective]
  config = {'length': L // 4, 'model.attention': name, 'model.initializer': 'fan_in'}
  experiment = parts(which, **own, **config)
  batch = loader.Loader(experiment.examples('train'), 4, 0).batch(0)
  params = jax.jit(lambda b: nn.unbox(experiment.init_params(jax.random.key(0), b)))(batch)
  row = int(batch['segments'].max(axis=1).argmax())
  packed, single = alone(batch, row)
  assert len(packed['tokens']) >= 2

  @jax.jit
  def losses(batch):
    one = lambda row: experiment.model.apply(
      {'params': params}, jax.tree.map(lambda x: x[None], row), train=False
    )[0]
    return jax.lax.map(one, batch)

  for term, got in losses(packed).items():
    np.testing.assert_allclose(got.total, losses(single)[term].total, rtol=2e-5, err_msg=term)
    assert (got.weight > 0).any()
