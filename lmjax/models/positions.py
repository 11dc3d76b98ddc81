"""Where a token stands: what is added to it, turned by it, or added to the attention logits.

B batch, L length (S of keys), D model, N heads, H head.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmjax.models import layers


class NoPositions(nn.Module):
  """Word order enters through the causal mask alone; and the three places where it can enter."""

  dim: int
  heads: int
  max_length: int
  initializers: layers.Initializers

  def add(self, x_BLD: jax.Array, positions_BL: jax.Array) -> jax.Array:
    """To the embedded tokens, before the first block."""
    return x_BLD

  @staticmethod
  def rotate(x_BLNH: jax.Array, positions_BL: jax.Array, base: float) -> jax.Array:
    """To the queries and keys of each block."""
    return x_BLNH

  def bias(self, query_BL: jax.Array, key_BS: jax.Array, causal: bool) -> jax.Array | None:
    """To the attention logits: bias_BNLS, shared by all blocks."""
    return None


class Learned(NoPositions):
  """A vector for each position (Devlin et al., 2019)."""

  def setup(self):
    axes = ('positions', 'embed')
    self.embed = layers.Embed(self.max_length, self.dim, axes, self.initializers, role='positions')

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
  def rotate(x_BLNH: jax.Array, positions_BL: jax.Array, base: float) -> jax.Array:
    angles_BLNH = _angles(positions_BL, x_BLNH.shape[-1], base)[:, :, None, :]
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
    self.table = self.param('table', layers.by_path(self, init), (self.buckets, self.heads))

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


def _angles(positions_BL: jax.Array, dim: int, base: float = 10_000.0) -> jax.Array:
  """[B, L, dim / 2] position times base^(-2i / dim)."""
  frequencies = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  return positions_BL[..., None].astype(jnp.float32) * frequencies[None, None]


POSITIONS = {
  'none': NoPositions,
  'learned': Learned,
  'sinusoidal': Sinusoidal,
  'rotary': Rotary,
  'alibi': Alibi,
  'relative': Relative,
}
