"""Cross-entropy against its formula in float64, and heads that are what they say."""

import math

import jax
import numpy as np
import pytest
from flax import linen as nn

from lmjax import sharding
from lmjax.data import loader
from lmjax.models import heads, layers


@pytest.mark.parametrize(('smoothing', 'z_loss'), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.3, 0.1)])
def test_cross_entropy_is_its_formula(smoothing, z_loss):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 4, (3, 7, 11)).astype(np.float32)
  targets = rng.integers(0, 11, (3, 7))
  targets[0] = logits[0].argmax(axis=-1)
  weights = rng.uniform(0, 2, (3, 7)).astype(np.float32)
  log_z = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
  log_p = logits - log_z[..., None]
  xent = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
  loss = (1 - smoothing) * xent - smoothing * log_p.mean(axis=-1) + z_loss * log_z**2
  expected = (loss, xent, targets == logits.argmax(axis=-1))
  got = heads.cross_entropy(logits, targets, weights, smoothing, z_loss)
  for mean, values in zip(got, expected, strict=True):
    np.testing.assert_allclose(mean.total, (values * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(mean.weight, weights.sum(), rtol=1e-6)


def test_the_classifier_is_a_pooler_and_a_linear_layer():
  classifier = heads.Classifier(3, layers.Initializers('fan_in', 1), np.float32)
  x = np.random.default_rng(0).normal(0, 1, (2, 4, 8)).astype(np.float32)
  variables = classifier.init(jax.random.key(0), x)
  noise = lambda p: np.random.default_rng(p.size).normal(0, 1, p.shape).astype(np.float32)
  boxes = jax.tree.map(noise, variables['params'])
  pooler, classes = (jax.tree.map(np.asarray, boxes[name]) for name in ('pooler', 'classes'))
  value = lambda part, key: part[key].value
  pooled = np.tanh(x @ value(pooler, 'kernel') + value(pooler, 'bias'))
  expected = pooled @ value(classes, 'kernel') + value(classes, 'bias')
  _, logits = classifier.apply({'params': boxes}, x)
  np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=1e-5)


# Devices: none, or a strategy and its mesh.
PLACES = {
  'one': ('replicate', {'data': 1}),
  'rows': ('fsdp', {'data': 2, 'model': 3}),
  'vocabulary': ('fsdp+tensor', {'data': 2, 'model': 3}),
  'length': ('sequence', {'data': 2, 'sequence': 3}),
}


@pytest.mark.parametrize(
  ('place', 'tied', 'chunks'),
  [
    *(('one', tied, chunks) for tied in (True, False) for chunks in (1, 3, 9)),
    *(('rows', True, 3), ('vocabulary', False, 3), ('vocabulary', True, 9), ('length', True, 3)),
  ],
)
def test_the_loss_in_chunks_is_that_of_all_logits(monkeypatch, place, tied, chunks):
  b, length, d, v = 6, 9, 12, 21
  strategy, sizes = PLACES[place]
  mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
  monkeypatch.setattr(heads, 'CHUNK', b * length * v // (chunks * mesh.size))
  head = heads.TokenHead(v, v, d, tied, True, layers.Initializers('fan_in', 1), np.float32)
  embed = layers.Embed(v, d, ('vocab', 'embed'), layers.Initializers('fan_in', 1))
  rng = np.random.default_rng(0)
  noise = lambda *shape: rng.normal(0, 1, shape).astype(np.float32)
  own = {'bias': noise(v)} | ({} if tied else {'table': {'table': noise(v, d)}})
  params, x = (own, {'table': noise(v, d)}), noise(b, length, d)
  targets, weights = rng.integers(0, v, (b, length)), np.abs(noise(b, length))

  def loss(params, x, method):
    x = nn.with_logical_constraint(x, ('batch', 'residual_length', 'embed'))
    bound = embed.bind({'params': params[1]})
    apply = lambda *args, name: head.apply({'params': params[0]}, *args, method=name)
    if method == 'loss':
      means = apply(x, bound, targets, weights, 0.3, 0.1, name='loss')
    else:
      logits = apply(x, bound, name='__call__')
      means = heads.cross_entropy(logits, targets, weights, 0.3, 0.1)
    return 0.7 * means[0].total, means

  with jax.set_mesh(mesh), sharding.logical_axes(strategy):
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (got, got_gradients), (expected, gradients) = (run(params, x, m) for m in ('loss', '__call__'))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(gradients), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_loss_in_chunks_needs_the_memory_of_a_chunk(monkeypatch):
  """Of 8 x 64 x 999 logits, 2 MiB, and their gradients in a program for this machine."""
  b, length, d, v = 8, 64, 4, 999
  head = heads.TokenHead(v, v, d, True, False, layers.Initializers('fan_in', 1), np.float32)
  embed = layers.Embed(v, d, ('vocab', 'embed'), layers.Initializers('fan_in', 1))
  struct = lambda shape, dtype=np.float32: jax.ShapeDtypeStruct(shape, dtype)
  arrays = (
    struct((v, d)),
    struct((b, length, d)),
    struct((b, length), np.int32),
    struct((b, length)),
  )

  def loss(table, x, targets, weights):
    bound = embed.bind({'params': {'table': table}})
    return head.apply({}, x, bound, targets, weights, method='loss')[0].total

  def temporaries(chunk):
    monkeypatch.setattr(heads, 'CHUNK', chunk)
    program = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
    return program.memory_analysis().temp_size_in_bytes

  assert temporaries(1 << 26) > 4 * b * length * v
  assert temporaries(b * 4 * v) < 4 * b * length * v / 4


@pytest.mark.parametrize('objective', ['clm', 'mlm'])
def test_padding_of_the_table_changes_nothing(parts, objective):
  """The rows that no token has get no probability, and the others the same initial values."""
  own = {'objective.label_smoothing': 0.1, 'objective.tied': False}
  results = []
  for multiple in (1, 128):
    experiment = parts(objective, **own, **{'model.vocab_multiple': multiple})
    batch = loader.Loader(experiment.examples('train'), 8, 0).batch(0)
    params = jax.jit(lambda b, e=experiment: nn.unbox(e.init_params(jax.random.key(0), b)))(batch)

    def loss(params, model=experiment.model, batch=batch):
      return model.apply({'params': params}, batch, train=False)[0][objective].total

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    results.append((value, gradients['embed']['table'], params['embed']['table']))
  (value, gradient, table), (padded, padded_gradient, padded_table) = results
  v = experiment.tokenizer.vocab_size
  assert padded_table.shape[0] == 384
  assert not np.asarray(padded_gradient[v:]).any()
  np.testing.assert_array_equal(padded_table[:v], table)
  np.testing.assert_allclose(padded, value, rtol=1e-6)
  np.testing.assert_allclose(padded_gradient[:v], gradient, rtol=1e-4, atol=1e-6)
