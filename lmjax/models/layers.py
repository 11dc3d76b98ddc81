"""The parts of every core: products, norms, embeddings, feed-forward, initialisers.

B batch, L length (S of keys), D model, N heads, H head, F feed-forward, V vocabulary.
Parameters are float32 and carry logical axis names; products run in the `dtype` of the core;
norms and softmax run in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lmjax.models import products, shards

Initializer = jax.nn.initializers.Initializer


# ---------------------------------------------------------------- initialisers, all in one place


def gpt2_init(role: str, fan_in: int, depth: int) -> Initializer:
  """Radford et al., 2019: normal(0.02); what is added to the residual stream / sqrt(2 depth)."""
  scale = {'residual': 1 / math.sqrt(2 * depth), 'positions': 0.5}.get(role, 1.0)
  return nn.initializers.normal(0.02 * scale)


def bert_init(role: str, fan_in: int, depth: int) -> Initializer:
  """Devlin et al., 2019: normal(0.02) cut off at two standard deviations, for every weight."""
  return nn.initializers.truncated_normal(0.02)


def fan_in_init(role: str, fan_in: int, depth: int) -> Initializer:
  """LeCun: variance 1 / fan-in; what is added to the residual stream / sqrt(2 depth).

  Tables are normal(0.02) and heads have variance 1 / fan-in^2 (Yang et al., 2022): with 1 / fan-in
  for these as well, the first loss would be ln V + 1/2.
  """
  scales = {'residual': 1 / math.sqrt(2 * depth), 'head': 1 / math.sqrt(fan_in)}
  std = scales.get(role, 1.0) / math.sqrt(fan_in)
  return nn.initializers.normal(0.02 if role in ('embedding', 'positions') else std)


INITS = {'gpt2': gpt2_init, 'bert': bert_init, 'fan_in': fan_in_init}


class Initializers:
  """What a core hands to its parts: role and fan-in -> initialiser."""

  def __init__(self, name: str, depth: int):
    self.name, self.depth = name, depth

  def __call__(self, role: str, fan_in: int) -> Initializer:
    return INITS[self.name](role, fan_in, self.depth)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Initializers) and vars(self) == vars(other)

  def __hash__(self) -> int:
    return hash((self.name, self.depth))


def by_path(module: nn.Module, init: Initializer) -> Initializer:
  """`init` with a key that follows from the path of the module alone, which draws no other.

  Linen's own key counts what was drawn before in the module, and in a scan it counts twice, so that
  without biases every kernel would begin as another.  What arms of an ablation share begins alike.
  """
  keys = module.scope.rngs  # none outside of init, where only the shape is asked for

  def draw(key: jax.Array, *args: Any) -> jax.Array:
    return init(keys['params'].as_jax_rng() if 'params' in keys else key, *args)

  return draw


# --------------------------------------------------------------------------- products and tables


class Linear(nn.Module):
  """x times a kernel: [..., *inputs] -> [..., *outputs], plus a bias.

  `axes` names the dimensions of the kernel, inputs first.
  """

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  axes: tuple[str, ...]
  initializers: Initializers
  role: str = 'kernel'
  bias: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    fan_in, n = math.prod(self.inputs), len(self.inputs)
    init = nn.with_logical_partitioning(self.initializers(self.role, fan_in), self.axes)
    kernel = self.param('kernel', by_path(self, init), (*self.inputs, *self.outputs)).astype(
      self.dtype
    )
    y = self._product(x.astype(self.dtype), kernel)
    if not self.bias:
      return y
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[n:])
    bias = self.param('bias', zeros, self.outputs).astype(self.dtype)
    return y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))

  def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    n, rows = len(self.inputs), shards.rows(x.shape[: x.ndim - len(self.inputs)])
    places, of_x = shards.places(self.axes, rows), PartitionSpec(*rows)
    if not any(places):
      return products.product(x, kernel, n)
    run = lambda x, part: products.product(x, shards.whole(part, places), n)
    return shards.on_rows(run, rows, (of_x, places), of_x)(x, kernel)


class Embed(nn.Module):
  """A table of vectors; rows are looked up, and `attend` multiplies by its transpose."""

  num: int
  dim: int
  axes: tuple[str, str]
  initializers: Initializers
  role: str = 'embedding'
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    init = nn.with_logical_partitioning(self.initializers(self.role, self.dim), self.axes)
    self.table = self.param('table', by_path(self, init), (self.num, self.dim))
    # For each device that has rows a whole table in the dtype of products, gathered once.
    table = self.table.astype(self.dtype)
    self.copies = functools.cache(lambda rows: shards.copies(table, self.axes, rows))

  def __call__(self, ids: jax.Array) -> jax.Array:
    rows = shards.rows(ids.shape)
    copies, places = self.copies(rows)
    of_ids = PartitionSpec(*rows)
    look_up = lambda copies, ids: _rows(copies[0], ids)
    return shards.on_rows(look_up, rows, (places, of_ids), of_ids)(copies, ids)

  def attend(self, x_BLD: jax.Array) -> jax.Array:
    """Logits in float32: rounded to bfloat16, in one row of forty the two largest are equal."""
    table = self.table.astype(self.dtype)
    return products.product(x_BLD.astype(self.dtype), table.T, 1, jnp.float32)


@jax.custom_vjp
def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
  """table[ids], whose gradient is summed in float32: a frequent row occurs thousands of times."""
  return table[ids]


def _rows_forward(table, ids):
  return table[ids], (table, ids)


def _rows_backward(saved, d):
  table, ids = saved
  return jnp.zeros(table.shape).at[ids].add(d.astype(jnp.float32)).astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def norm(kind: str, epsilon: float, bias: bool, axis: str = 'embed', name: str | None = None):
  """LayerNorm (Ba et al., 2016) or RMSNorm (Zhang & Sennrich, 2019), computed in float32."""
  ones = nn.with_logical_partitioning(nn.initializers.ones, (axis,))
  if kind == 'rmsnorm':
    return nn.RMSNorm(epsilon=epsilon, scale_init=ones, dtype=jnp.float32, name=name)
  zeros = nn.with_logical_partitioning(nn.initializers.zeros, (axis,))
  return nn.LayerNorm(
    epsilon=epsilon,
    use_bias=bias,
    scale_init=ones,
    bias_init=zeros,
    use_fast_variance=False,  # E[x^2] - E[x]^2 cancels in float32 when the mean is large
    dtype=jnp.float32,
    name=name,
  )


NORMS = ('layernorm', 'rmsnorm')

ACTIVATIONS: dict[str, Callable] = {
  'gelu': lambda x: nn.gelu(x, approximate=False),  # BERT
  'gelu_tanh': nn.gelu,  # GPT-2
  'relu': nn.relu,
  'swiglu': nn.silu,  # Shazeer, 2020, and below
  'geglu': lambda x: nn.gelu(x, approximate=False),
}
GATED = ('swiglu', 'geglu')


class FeedForward(nn.Module):
  """Two layers; the gated kinds multiply the activation by a third projection (Shazeer, 2020)."""

  dim: int
  ffn_dim: int
  kind: str
  initializers: Initializers
  bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    shared = dict(initializers=self.initializers, bias=self.bias, dtype=self.dtype)
    wide = dict(inputs=(self.dim,), outputs=(self.ffn_dim,), axes=('embed', 'mlp'), **shared)
    widen = lambda name: checkpoint_name(Linear(**wide, name=name)(x_BLD), 'hidden')
    h_BLF = ACTIVATIONS[self.kind](widen('up'))
    if self.kind in GATED:
      h_BLF *= widen('gate')
    h_BLF = nn.with_logical_constraint(h_BLF, ('batch', 'length', 'mlp'))
    down = Linear(
      (self.ffn_dim,), (self.dim,), ('mlp', 'embed'), role='residual', **shared, name='down'
    )
    return down(h_BLF)
