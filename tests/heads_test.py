"""Cross-entropy against its formula in float64, and heads that are what they say."""

import jax
import numpy as np
import pytest

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
  np.testing.assert_allclose(classifier.apply({'params': boxes}, x), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize('chunk', [1 << 26, 100, 11, 1])
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize(('smoothing', 'z_loss'), [(0.0, 0.0), (0.3, 0.1)])
def test_the_loss_in_chunks_is_that_of_all_logits(monkeypatch, chunk, tied, smoothing, z_loss):
  monkeypatch.setattr(heads, 'CHUNK', chunk)
  b, length, d, v = 3, 7, 5, 11
  head = heads.TokenHead(v, d, tied, True, layers.Initializers('fan_in', 1), np.float32)
  embed = layers.Embed(v, d, ('vocab', 'embed'), layers.Initializers('fan_in', 1))
  rng = np.random.default_rng(0)
  noise = lambda *shape: rng.normal(0, 1, shape).astype(np.float32)
  own = {'bias': noise(v)} | ({} if tied else {'table': {'table': noise(v, d)}})
  params, x = (own, {'table': noise(v, d)}), noise(b, length, d)
  targets, weights = rng.integers(0, v, (b, length)), np.abs(noise(b, length))

  def loss(params, x, method):
    bound = embed.bind({'params': params[1]})
    apply = lambda *args, name: head.apply({'params': params[0]}, *args, method=name)
    if method == 'loss':
      means = apply(x, bound, targets, weights, smoothing, z_loss, name='loss')
    else:
      logits = apply(x, bound, name='__call__')
      means = heads.cross_entropy(logits, targets, weights, smoothing, z_loss)
    return 0.7 * means[0].total, means

  values, gradients = zip(
    *(
      jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)(
        params, x, m
      )
      for m in ('loss', '__call__')
    ),
    strict=True,
  )
  for a, b in zip(*map(jax.tree.leaves, (values)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
