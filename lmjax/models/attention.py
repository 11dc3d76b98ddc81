"""Attention: a structured mask, one function with several backends, one module.

B batch, L query length, S key length, D model, N query heads, G key-value heads, H head.
"""

import functools
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lmjax.models import flash, layers, products


@flax.struct.dataclass
class Mask:
  """Who may attend to whom, kept as structure so that a kernel can use it; all that is set holds.

  causal: a query sees the keys at its own place and before it.
  segments_BL: a query sees the keys of its own segment; segment 0 is padding, which sees nothing.
  lengths_B: what is at this place or after it is padding.
  prefix_B: though causal, all see the keys before this place (Raffel et al., 2020).
  window: a query sees keys fewer than so many places away; 0: any.
  """

  causal: bool = flax.struct.field(pytree_node=False)
  segments_BL: jax.Array | None = None
  lengths_B: jax.Array | None = None
  prefix_B: jax.Array | None = None
  window: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def kinds(self) -> tuple[str, ...]:
    """What a kernel must know of; each knows the mask that hides nothing."""
    window = 'sliding window' if self.causal else 'bidirectional window'
    kinds = {'causal': self.causal, window: self.window, 'prefix': self.prefix_B is not None}
    kinds |= {'segments': self.segments_BL is not None, 'padding': self.lengths_B is not None}
    return tuple(kind for kind, present in kinds.items() if present)

  def array(self, length: int, keys: int, offset: jax.Array | int = 0) -> jax.Array:
    """Boolean [1 or B, L, S], True where attention is allowed.

    `offset` is the place of the first query among the keys (not zero only with a cache).
    """
    distance_LS = offset + jnp.arange(length)[:, None] - jnp.arange(keys)[None, :]
    allowed_BLS = (distance_LS >= (0 if self.causal else -keys))[None]
    if self.prefix_B is not None:
      allowed_BLS |= jnp.arange(keys)[None, None] < self.prefix_B[:, None, None]
    if self.window:
      allowed_BLS &= (jnp.abs(distance_LS) < self.window)[None]
    segments_BL = self.segments(keys)
    if segments_BL is not None:
      query_BLS, key_BLS = segments_BL[:, :length, None], segments_BL[:, None, :]
      allowed_BLS &= (query_BLS == key_BLS) & (key_BLS > 0)
    return allowed_BLS

  def pairs(self, length: int) -> int:
    """How many pairs of a query and a key are seen, as far as `causal` and `window` say."""
    reach = min(self.window or length, length)
    before = np.minimum(np.arange(length), reach - 1)  # of each query; as many after it
    return int(length + before.sum() * (1 if self.causal else 2))

  def segments(self, length: int) -> jax.Array | None:
    """segments_BL with all padding 0; None where there are neither documents nor padding."""
    if self.lengths_B is None:
      return self.segments_BL
    real_BL = jnp.arange(length)[None] < self.lengths_B[:, None]
    return real_BL.astype(jnp.int32) * (1 if self.segments_BL is None else self.segments_BL)


def attention(
  q_BLNH: jax.Array,
  k_BSGH: jax.Array,
  v_BSGH: jax.Array,
  mask: Mask,
  *,
  backend: str = 'auto',
  bias_BNLS: jax.Array | None = None,
  dropout: nn.Module | None = None,
  offset: jax.Array | int | None = None,
  say: bool = False,
) -> jax.Array:
  """Softmax attention, [B, L, N, H]; N is a multiple of G (Ainslie et al., 2023).

  The softmax is in float32.  A query that may attend to nothing yields zeros.

  Args:
    backend: of flash.BACKENDS; auto: the first kernel of the devices' platform that can do it.
    bias_BNLS: added to the logits.
    dropout: applied to the attention weights.
    offset: the place of the first query among the keys of a cache.
    say: prints what `auto` has chosen and why, once.

  Raises:
    UserError: the named backend cannot do it.
  """
  length, head_dim = q_BLNH.shape[1], q_BLNH.shape[3]
  asked = dict(bias=bias_BNLS is not None, dropout=dropout is not None, cache=offset is not None)
  asked |= dict(masks=mask.kinds, dtype=q_BLNH.dtype.name, head_dim=head_dim, length=length)
  # Who asks for a kernel means the training; text is generated with a cache, which none has.
  chosen, why = flash.choose('auto' if asked['cache'] else backend, **asked)
  if say and backend == 'auto':
    _say(f'attention: {chosen} ({why})')
  if chosen == 'reference':
    allowed_BLS = mask.array(length, k_BSGH.shape[1], 0 if offset is None else offset)
    y_BLNH = reference(q_BLNH, k_BSGH, v_BSGH, allowed_BLS, bias_BNLS, dropout)
    return checkpoint_name(y_BLNH, 'attended')
  y_BLNH = flash.KERNELS[chosen].call(q_BLNH, k_BSGH, v_BSGH, mask)
  segments_BL = mask.segments(length)
  if segments_BL is None:
    return y_BLNH
  return jnp.where(segments_BL[:, :, None, None] > 0, y_BLNH, 0)


@functools.cache
def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)


def reference(
  q_BLNH: jax.Array,
  k_BSGH: jax.Array,
  v_BSGH: jax.Array,
  allowed_BLS: jax.Array,
  bias_BNLS: jax.Array | None = None,
  dropout: nn.Module | None = None,
) -> jax.Array:
  """Attention in plain XLA, which holds the square of the logits and can do everything."""
  (b, length, n, h), (keys, g) = q_BLNH.shape, k_BSGH.shape[1:3]
  weights = _weights(q_BLNH, k_BSGH, allowed_BLS, bias_BNLS).astype(v_BSGH.dtype)
  if dropout is not None:
    weights = dropout(weights)
  y_BGLH = products.matmul(weights.reshape(b, g, n // g * length, keys), v_BSGH.swapaxes(1, 2))
  y_BLNH = y_BGLH.reshape(b, n, length, h).swapaxes(1, 2)
  return y_BLNH * allowed_BLS.any(axis=-1)[:, :, None, None]


def _weights(
  q_BLNH: jax.Array, k_BSGH: jax.Array, allowed_BLS: jax.Array, bias_BNLS: jax.Array | None
) -> jax.Array:
  """float32 [B, G, N / G, L, S], which add up to 1 over the keys."""
  (b, length, n, h), (keys, g) = q_BLNH.shape, k_BSGH.shape[1:3]
  # Heads in front, and the R = N / G queries of a key-value head as more rows of one product: on a
  # CPU 1.4 times as fast as one einsum over five dimensions.
  q_BGRLH = q_BLNH.reshape(b, length, g, n // g, h).transpose(0, 2, 3, 1, 4) * h**-0.5
  rows_BGRH = q_BGRLH.reshape(b, g, n // g * length, h)
  logits = products.matmul(rows_BGRH, k_BSGH.swapaxes(1, 2).mT, jnp.float32)
  logits = logits.reshape(b, g, n // g, length, keys)
  if bias_BNLS is not None:
    logits += bias_BNLS.reshape(-1, g, n // g, *bias_BNLS.shape[2:])
  logits = jnp.where(allowed_BLS[:, None, None], logits, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(logits)


class Attention(nn.Module):
  """Multi-head or grouped-query self-attention with an optional cache of keys and values.

  Applied with mutable=['intermediates'] it also gives `weights` [B, N, L, S], without dropout.
  """

  dim: int
  heads: int
  kv_heads: int
  rotate: Callable  # NoPositions.rotate or another's
  rotary_base: float
  initializers: layers.Initializers
  bias: bool
  qk_norm: bool  # Henry et al., 2020: normalised queries and keys keep the logits bounded
  window: int
  dropout: float
  backend: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    mask: Mask,
    positions_BL: jax.Array,
    bias_BNLS: jax.Array | None,
    train: bool,
    cache_length: int = 0,
  ) -> jax.Array:
    head_dim = self.dim // self.heads
    shared = dict(initializers=self.initializers, bias=self.bias, dtype=self.dtype)

    def project(name, heads):
      axes = ('embed', 'heads', 'kv')
      linear = layers.Linear((self.dim,), (heads, head_dim), axes, **shared, name=name)
      return checkpoint_name(linear(x_BLD), 'qkv')

    q_BLNH = project('query', self.heads)
    k_BLGH = project('key', self.kv_heads)
    v_BLGH = project('value', self.kv_heads)
    if self.qk_norm:
      q_BLNH = layers.norm('rmsnorm', 1e-6, False, 'kv', 'query_norm')(q_BLNH).astype(self.dtype)
      k_BLGH = layers.norm('rmsnorm', 1e-6, False, 'kv', 'key_norm')(k_BLGH).astype(self.dtype)
    q_BLNH, k_BLGH = (self.rotate(x, positions_BL, self.rotary_base) for x in (q_BLNH, k_BLGH))
    offset = None
    if cache_length:
      k_BLGH, v_BLGH, offset = self._cached(k_BLGH, v_BLGH, cache_length)
    q_BLNH = nn.with_logical_constraint(q_BLNH, ('batch', 'length', 'heads', 'kv'))
    # A strategy that shards the length gathers the keys and values.
    k_BLGH, v_BLGH = (
      nn.with_logical_constraint(x, ('batch', None, 'heads', 'kv')) for x in (k_BLGH, v_BLGH)
    )
    mask = mask.replace(window=self.window)
    if self.is_mutable_collection('intermediates'):  # by who wants to see them, as Flax has it
      allowed_BLS = mask.array(q_BLNH.shape[1], k_BLGH.shape[1], 0 if offset is None else offset)
      weights = _weights(q_BLNH, k_BLGH, allowed_BLS, bias_BNLS)
      self.sow(
        'intermediates', 'weights', weights.reshape(*weights.shape[:1], -1, *weights.shape[3:])
      )
    y_BLNH = attention(
      q_BLNH,
      k_BLGH,
      v_BLGH,
      mask,
      backend=self.backend,
      bias_BNLS=bias_BNLS,
      dropout=nn.Dropout(self.dropout, deterministic=False) if self.dropout and train else None,
      offset=offset,
      say=train,
    )
    inputs, axes = (self.heads, head_dim), ('heads', 'kv', 'embed')
    out = layers.Linear(inputs, (self.dim,), axes, role='residual', **shared, name='out')
    return out(y_BLNH)

  def _cached(
    self, k_BLGH: jax.Array, v_BLGH: jax.Array, length: int
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Appends to the cache; returns all of it and the place of the first new key."""
    shape = (k_BLGH.shape[0], length, *k_BLGH.shape[2:])
    keys = self.variable('cache', 'keys', jnp.zeros, shape, self.dtype)
    values = self.variable('cache', 'values', jnp.zeros, shape, self.dtype)
    filled = self.variable('cache', 'filled', jnp.zeros, (), jnp.int32)
    offset = filled.value
    keys.value = jax.lax.dynamic_update_slice_in_dim(keys.value, k_BLGH, offset, axis=1)
    values.value = jax.lax.dynamic_update_slice_in_dim(values.value, v_BLGH, offset, axis=1)
    filled.value = offset + k_BLGH.shape[1]
    return keys.value, values.value, offset
