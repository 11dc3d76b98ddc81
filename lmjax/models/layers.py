"""The parts of every core: products, norms, embeddings, positions, feed-forward, initialisers.

B batch, L length (S of keys), D model, N heads, H head, F feed-forward, V vocabulary.
Parameters are float32 and carry logical axis names; products run in the `dtype` of the core;
norms and softmax run in float32.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.models import products

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
    kernel = self.param('kernel', init, (*self.inputs, *self.outputs)).astype(self.dtype)
    y = products.product(x.astype(self.dtype), kernel, n)
    if not self.bias:
      return y
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[n:])
    bias = self.param('bias', zeros, self.outputs).astype(self.dtype)
    return y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))


class Embed(nn.Module):
  """A table of vectors; rows are looked up, and `attend` multiplies by its transpose."""

  num: int
  dim: int
  axes: tuple[str, str]
  initializers: Initializers
  role: str = 'embedding'

  def setup(self):
    init = nn.with_logical_partitioning(self.initializers(self.role, self.dim), self.axes)
    self.table = self.param('table', init, (self.num, self.dim))

  def __call__(self, ids: jax.Array) -> jax.Array:
    return self.table[ids]

  def attend(self, x_BLD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Logits in float32: rounded to bfloat16, in one row of forty the two largest are equal."""
    return products.product(x_BLD.astype(dtype), self.table.astype(dtype).T, 1, jnp.float32)


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
    h_BLF = ACTIVATIONS[self.kind](Linear(**wide, name='up')(x_BLD))
    if self.kind in GATED:
      h_BLF *= Linear(**wide, name='gate')(x_BLD)
    h_BLF = nn.with_logical_constraint(h_BLF, ('batch', 'length', 'mlp'))
    down = Linear(
      (self.ffn_dim,), (self.dim,), ('mlp', 'embed'), role='residual', **shared, name='down'
    )
    return down(h_BLF)


# -------------------------------------------------------------------------------------- positions


class NoPositions(nn.Module):
  """Word order enters through the causal mask alone; and the three places where it can enter."""

  dim: int
  heads: int
  max_length: int
  initializers: Initializers

  def add(self, x_BLD: jax.Array, positions_BL: jax.Array) -> jax.Array:
    """To the embedded tokens, before the first block."""
    return x_BLD

  @staticmethod
  def rotate(x_BLNH: jax.Array, positions_BL: jax.Array) -> jax.Array:
    """To the queries and keys of each block."""
    return x_BLNH

  def bias(self, query_BL: jax.Array, key_BS: jax.Array, causal: bool) -> jax.Array | None:
    """To the attention logits: bias_BNLS, shared by all blocks."""
    return None


class Learned(NoPositions):
  """A vector for each position (Devlin et al., 2019)."""

  def setup(self):
    axes = ('positions', 'embed')
    self.embed = Embed(self.max_length, self.dim, axes, self.initializers, role='positions')

  def add(self, x_BLD: jax.Array, positions_BL: jax.Array) -> jax.Array:
    return x_BLD + self.embed(positions_BL)


class Sinusoidal(NoPositions):
  """Sines and cosines of geometrically falling frequency (Vaswani et al., 2017)."""

  def add(self, x_BLD: jax.Array, positions_BL: jax.Array) -> jax.Array:
    angles_BLD = _angles(positions_BL, self.dim)
    table_BLD = jnp.concatenate([jnp.sin(angles_BLD), jnp.cos(angles_BLD)], axis=-1)
    # Ours are of the size of the embeddings (0.02), as the paper's are by scaling up the tokens.
    return x_BLD + 0.02 * table_BLD


class Rotary(NoPositions):
  """Queries and keys rotated by an angle that grows with position (Su et al., 2021)."""

  @staticmethod
  def rotate(x_BLNH: jax.Array, positions_BL: jax.Array) -> jax.Array:
    angles_BLNH = _angles(positions_BL, x_BLNH.shape[-1])[:, :, None, :]
    a_BLNH, b_BLNH = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    sin_BLNH, cos_BLNH = jnp.sin(angles_BLNH), jnp.cos(angles_BLNH)
    rotated = [a_BLNH * cos_BLNH - b_BLNH * sin_BLNH, b_BLNH * cos_BLNH + a_BLNH * sin_BLNH]
    return jnp.concatenate(rotated, axis=-1).astype(x_BLNH.dtype)


class Alibi(NoPositions):
  """A penalty linear in distance, steeper in each head (Press et al., 2022)."""

  def bias(self, query_BL: jax.Array, key_BS: jax.Array, causal: bool) -> jax.Array:
    power = 2 ** math.floor(math.log2(self.heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    # Heads beyond a power of two take every other slope of the next power, as the authors do.
    slopes += [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (self.heads - power), 2)]
    distance_BLS = jnp.abs(query_BL[:, :, None] - key_BS[:, None, :])
    return -jnp.array(slopes)[None, :, None, None] * distance_BLS[:, None]


class Relative(NoPositions):
  """A learned number for each head and bucket of distances (Raffel et al., 2020)."""

  buckets: int = 32
  max_distance: int = 128

  def setup(self):
    # 1 / sqrt(buckets) keeps the bias below the logits' own spread at the start.
    init = nn.with_logical_partitioning(
      nn.initializers.normal(self.buckets**-0.5), ('buckets', 'heads')
    )
    self.table = self.param('table', init, (self.buckets, self.heads))

  def bias(self, query_BL: jax.Array, key_BS: jax.Array, causal: bool) -> jax.Array:
    distance_BLS = query_BL[:, :, None] - key_BS[:, None, :]
    bucket_BLS = self._bucket(distance_BLS, causal)
    return jnp.moveaxis(self.table[bucket_BLS], -1, 1)

  def _bucket(self, distance: jax.Array, causal: bool) -> jax.Array:
    """Half of the buckets are exact, half grow logarithmically; bidirectional splits by sign."""
    buckets = self.buckets if causal else self.buckets // 2
    offset = 0 if causal else jnp.where(distance < 0, buckets, 0)
    distance = jnp.maximum(distance, 0) if causal else jnp.abs(distance)
    exact = buckets // 2
    ratio = jnp.maximum(distance, exact) / exact
    log = exact + jnp.log(ratio) / math.log(self.max_distance / exact) * (buckets - exact)
    far = jnp.minimum(log.astype(jnp.int32), buckets - 1)
    return offset + jnp.where(distance < exact, distance, far)


def _angles(positions_BL: jax.Array, dim: int) -> jax.Array:
  """[B, L, dim / 2] position times 10000^(-2i / dim)."""
  frequencies = 10_000.0 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  return positions_BL[..., None].astype(jnp.float32) * frequencies[None, None]


POSITIONS = {
  'none': NoPositions,
  'learned': Learned,
  'sinusoidal': Sinusoidal,
  'rotary': Rotary,
  'alibi': Alibi,
  'relative': Relative,
}
