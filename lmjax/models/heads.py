"""From contextual vectors to numbers: vocabulary logits, classes, cross-entropy.

B batch, L length (or K chosen places), D model, V vocabulary, C classes.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.metrics import Mean
from lmjax.models import layers


class TokenHead(nn.Module):
  """Logits over the vocabulary in float32, tied to the embedding table or with one of its own."""

  vocab_size: int
  tied: bool
  bias: bool
  initializers: layers.Initializers
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BLD: jax.Array, embed: layers.Embed) -> jax.Array:
    if not self.tied:
      shape = (self.vocab_size, x_BLD.shape[-1])
      embed = layers.Embed(*shape, ('vocab', 'embed'), self.initializers, role='head', name='table')
    logits_BLV = embed.attend(x_BLD, self.dtype)
    if not self.bias:
      return logits_BLV
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('vocab',))
    return logits_BLV + self.param('bias', zeros, (self.vocab_size,))[None, None]


class Classifier(nn.Module):
  """BERT's pooler (a dense layer and tanh) and a linear layer: [B, P, D] -> [B, P, C]."""

  classes: int
  initializers: layers.Initializers
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BPD: jax.Array) -> jax.Array:
    d = x_BPD.shape[-1]
    shared = dict(initializers=self.initializers, dtype=self.dtype)
    pooler = layers.Linear((d,), (d,), ('embed', 'mlp'), **shared, name='pooler')
    axes = ('embed', 'classes')
    classes = layers.Linear((d,), (self.classes,), axes, role='head', **shared, name='classes')
    return classes(jnp.tanh(pooler(x_BPD))).astype(jnp.float32)


def cross_entropy(
  logits_BLV: jax.Array,
  targets_BL: jax.Array,
  weights_BL: jax.Array,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> tuple[Mean, Mean, Mean]:
  """(loss, cross-entropy, accuracy), each a Mean over the weighted places; natural logarithms.

  The loss is the cross-entropy against targets smoothed towards uniform (Szegedy et al., 2016) plus
  z_loss * log(Z)^2 (Chowdhery et al., 2022); the second number has neither.
  """
  largest_BL = jax.lax.stop_gradient(logits_BLV.max(axis=-1))
  sum_BL = jnp.exp(logits_BLV - largest_BL[..., None]).sum(axis=-1)
  log_z_BL = largest_BL + jnp.log(sum_BL)
  target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
  xent_BL = log_z_BL - target_BL
  loss_BL = xent_BL
  if label_smoothing:
    uniform_BL = log_z_BL - logits_BLV.mean(axis=-1)
    loss_BL = (1 - label_smoothing) * xent_BL + label_smoothing * uniform_BL
  if z_loss:
    loss_BL += z_loss * log_z_BL**2
  right_BL = target_BL >= largest_BL  # an argmax would be one more pass over the logits
  weight = weights_BL.sum()
  return tuple(Mean((x_BL * weights_BL).sum(), weight) for x_BL in (loss_BL, xent_BL, right_BL))
