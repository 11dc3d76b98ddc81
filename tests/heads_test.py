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
