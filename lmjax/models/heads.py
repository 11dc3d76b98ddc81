"""From contextual vectors to numbers: vocabulary logits, classes, cross-entropy.

B batch, L length (or K chosen places), D model, V vocabulary, C classes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from lmjax.metrics import Mean
from lmjax.models import layers, products, shards


def table_rows(vocab_size: int, multiple: int) -> int:
  """Rows of a table of the vocabulary: with some that no token has, it divides over devices."""
  return -(-vocab_size // multiple) * multiple


class TokenHead(nn.Module):
  """Logits over the vocabulary in float32, tied to the embedding table or with one of its own."""

  vocab_size: int
  rows: int  # of the table; those beyond the vocabulary have no probability
  dim: int
  tied: bool
  bias: bool
  initializers: layers.Initializers
  dtype: jnp.dtype

  def setup(self):
    if not self.tied:
      axes = ('vocab', 'embed')
      self.table = layers.Embed(self.rows, self.dim, axes, self.initializers, 'head', self.dtype)
    if self.bias:
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('vocab',))
      self.bias_V = self.param('bias', zeros, (self.rows,))

  def __call__(self, x_BLD: jax.Array, embed: layers.Embed) -> jax.Array:
    logits_BLV = (embed if self.tied else self.table).attend(x_BLD)
    logits_BLV = logits_BLV + self.bias_V[None, None] if self.bias else logits_BLV
    return logits_BLV[..., : self.vocab_size]

  def loss(
    self,
    x_BLD: jax.Array,
    embed: layers.Embed,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
  ) -> tuple[Mean, Mean, Mean]:
    """cross_entropy of the logits, which never are in memory all at once.

    Gradients flow through the first number only; the others are to be looked at.
    """
    options = (label_smoothing, z_loss, self.vocab_size, self.dtype)
    bias_V = self.bias_V if self.bias else jnp.zeros(self.rows)
    rows = shards.rows(x_BLD.shape[:2])
    copies, of_copies = (embed if self.tied else self.table).copies(rows)
    of_bias, of_rows = shards.places(('vocab',), rows), PartitionSpec(*rows)

    def totals(x_BLD, copies_1VD, bias, targets_BL, weights_BL):
      bias_V = shards.whole(bias, of_bias)
      sums = _chunked(x_BLD, copies_1VD[0], bias_V, targets_BL, weights_BL, *options)
      return jnp.stack(sums)[None]

    # The gradient of the table is summed over the devices once, not in every chunk.
    places = (of_rows, of_copies, of_bias, of_rows, of_rows)
    run = shards.on_rows(totals, rows, places, PartitionSpec(sum(rows, ())))
    sums = run(x_BLD, copies, bias_V, targets_BL, weights_BL).sum(axis=0)
    weight = weights_BL.sum()
    return tuple(Mean(total, weight) for total in sums)


class Classifier(nn.Module):
  """BERT's pooler (a dense layer and tanh), and a linear layer: -> [B, P, D], [B, P, C]."""

  classes: int
  initializers: layers.Initializers
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BPD: jax.Array) -> tuple[jax.Array, jax.Array]:
    d = x_BPD.shape[-1]
    shared = dict(initializers=self.initializers, dtype=self.dtype)
    pooler = layers.Linear((d,), (d,), ('embed', 'mlp'), **shared, name='pooler')
    axes = ('embed', 'classes')
    classes = layers.Linear((d,), (self.classes,), axes, role='head', **shared, name='classes')
    pooled_BPD = jnp.tanh(pooler(x_BPD))
    return pooled_BPD, classes(pooled_BPD).astype(jnp.float32)


def cross_entropy(
  logits_BLV: jax.Array,
  targets_BL: jax.Array,
  weights_BL: jax.Array,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  classes: int | None = None,
) -> tuple[Mean, Mean, Mean]:
  """(loss, cross-entropy, accuracy), each a Mean over the weighted places; natural logarithms.

  The loss is the cross-entropy against targets smoothed towards uniform (Szegedy et al., 2016) plus
  z_loss * log(Z)^2 (Chowdhery et al., 2022); the second number has neither.  Of V only the first
  `classes` are any; None: all.
  """
  classes = classes or logits_BLV.shape[-1]
  real_BLV = jnp.arange(logits_BLV.shape[-1])[None, None] < classes
  if classes < logits_BLV.shape[-1]:
    logits_BLV = jnp.where(real_BLV, logits_BLV, jnp.finfo(logits_BLV.dtype).min)
  largest_BL = jax.lax.stop_gradient(logits_BLV.max(axis=-1))
  sum_BL = jnp.exp(logits_BLV - largest_BL[..., None]).sum(axis=-1)
  log_z_BL = largest_BL + jnp.log(sum_BL)
  target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
  xent_BL = log_z_BL - target_BL
  loss_BL = xent_BL
  if label_smoothing:
    uniform_BL = log_z_BL - (logits_BLV * real_BLV).sum(axis=-1) / classes
    loss_BL = (1 - label_smoothing) * xent_BL + label_smoothing * uniform_BL
  if z_loss:
    loss_BL += z_loss * log_z_BL**2
  right_BL = target_BL >= largest_BL  # an argmax would be one more pass over the logits
  weight = weights_BL.sum()
  return tuple(Mean((x_BL * weights_BL).sum(), weight) for x_BL in (loss_BL, xent_BL, right_BL))


# ---------------------------------------------- cross-entropy without all the logits in memory

CHUNK = 1 << 26  # logits at a time on a device: 256 MiB of float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _chunked(
  x_BLD, table_VD, bias_V, targets_BL, weights_BL, label_smoothing, z_loss, classes, dtype
):
  """Totals of cross_entropy(x @ table.T + bias); the first has gradients by x, table and bias.

  They are computed with the loss, chunk by chunk, so that no logits are kept or computed twice.
  """
  options = (label_smoothing, z_loss, classes, dtype)
  return _scan(x_BLD, table_VD, bias_V, targets_BL, weights_BL, *options, gradients=False)[0]


def _forward(*args):
  return _scan(*args, gradients=True)


def _backward(label_smoothing, z_loss, classes, dtype, gradients, of_totals):
  return *(x * of_totals[0].astype(x.dtype) for x in gradients), None, None


_chunked.defvjp(_forward, _backward)


def _scan(
  x_BLD,
  table_VD,
  bias_V,
  targets_BL,
  weights_BL,
  label_smoothing,
  z_loss,
  classes,
  dtype,
  gradients,
):
  """(totals, gradients of the first of them), summed over chunks of the length."""
  (b, length, d), v = x_BLD.shape, len(table_VD)
  least = math.ceil(b * length * v / (CHUNK * shards.ways('batch', 'length', 'vocab')))
  n = next(n for n in range(1, length + 1) if n >= min(least, length) and length % n == 0)

  def cut(x):
    # Every n-th place, so that each shard of the length has its share of a chunk.
    return jnp.moveaxis(x.reshape(b, length // n, n, *x.shape[2:]), 2, 0)

  def body(carry, chunk):
    x_BCD, targets_BC, weights_BC = chunk
    x_BCD = x_BCD.astype(dtype)
    logits_BCV = products.product(x_BCD, table_VD.T, 1, jnp.float32) + bias_V[None, None]
    logits_BCV = nn.with_logical_constraint(logits_BCV, ('batch', None, 'vocab'))

    def totals(logits_BCV):
      means = cross_entropy(logits_BCV, targets_BC, weights_BC, label_smoothing, z_loss, classes)
      return means[0].total, tuple(mean.total for mean in means)

    if not gradients:
      return jax.tree.map(jnp.add, carry, totals(logits_BCV)[1]), None
    d_BCV, sums = jax.grad(totals, has_aux=True)(logits_BCV)
    d_V, d_BCV = d_BCV.sum(axis=(0, 1)), d_BCV.astype(dtype)
    d_BCD = jnp.einsum('BCV,VD->BCD', d_BCV, table_VD, preferred_element_type=jnp.float32)
    d_VD = jnp.einsum('BCV,BCD->VD', d_BCV, x_BCD, preferred_element_type=jnp.float32)
    return jax.tree.map(jnp.add, carry, (sums, d_VD, d_V)), d_BCD.astype(x_BLD.dtype)

  sums = (jnp.float32(0),) * 3
  carry = (sums, jnp.zeros((v, d)), jnp.zeros(v)) if gradients else sums
  carry, d_NBCD = jax.lax.scan(body, carry, tuple(map(cut, (x_BLD, targets_BL, weights_BL))))
  if not gradients:
    return carry, None
  d_BLD = jnp.moveaxis(d_NBCD, 0, 2).reshape(b, length, d)
  sums, d_VD, d_V = carry
  return sums, (d_BLD, d_VD.astype(table_VD.dtype), d_V)
