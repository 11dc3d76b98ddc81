"""The Transformer, encoder or decoder by its mask alone, composed of parts chosen by name.

B batch, L length, D model, N heads.  Vaswani et al., 2017.
"""

from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from flax import linen as nn

from lmjax.config import did_you_mean
from lmjax.errors import UserError
from lmjax.models import flash, layers, shards
from lmjax.models.attention import Attention, Mask
from lmjax.models.positions import POSITIONS, NoPositions

SIZES = {
  # Devlin et al., 2019; Turc et al., 2019, for the small ones.
  'bert_tiny': dict(depth=2, dim=128, heads=2),
  'bert_mini': dict(depth=4, dim=256, heads=4),
  'bert_small': dict(depth=4, dim=512, heads=8),
  'bert_medium': dict(depth=8, dim=512, heads=8),
  'bert_base': dict(depth=12, dim=768, heads=12),
  'bert_large': dict(depth=24, dim=1024, heads=16),
  # Radford et al., 2019.
  'gpt2_small': dict(depth=12, dim=768, heads=12),
  'gpt2_medium': dict(depth=24, dim=1024, heads=16),
  'gpt2_large': dict(depth=36, dim=1280, heads=20),
  'gpt2_xl': dict(depth=48, dim=1600, heads=25),
}

BETWEEN = ('batch', 'residual_length', 'embed')  # the residual stream between two parts
NORM_POSITIONS = ('pre', 'post', 'both')


def _all_but_gathered(primitive: jax.extend.core.Primitive, *_: object, **__: object) -> bool:
  """Kernels are gathered again, and so the reshaped ones, which cost nothing."""
  return primitive.name not in ('all_gather', 'linear_call', 'reshape', 'squeeze', 'transpose')


REMAT = {  # name -> what a block keeps for its backward pass, the most first
  'none': _all_but_gathered,
  'dots': jax.checkpoint_policies.dots_saveable,
  'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # All but norms, activations and the product with the weights of attention's output; and, the
  # second, but attention: its result fills twice its bytes on a TPU where heads have 64 dims.
  'attended': jax.checkpoint_policies.save_only_these_names('qkv', 'attended', 'hidden'),
  'projections': jax.checkpoint_policies.save_only_these_names('qkv', 'hidden'),
  'full': jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
  """Attention and feed-forward, each added to the residual stream."""

  attention: nn.Module
  ffn: nn.Module
  norm: str
  norm_position: str
  norm_epsilon: float
  bias: bool
  dropout: float

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    mask: Mask,
    positions_BL: jax.Array,
    bias_BNLS: jax.Array | None,
    train: bool,
    cache_length: int,
  ) -> tuple[jax.Array, None]:
    def attend(h_BLD):
      return self.attention(h_BLD, mask, positions_BL, bias_BNLS, train, cache_length)

    x_BLD = self._residual(x_BLD, attend, 'attention', train)
    x_BLD = self._residual(x_BLD, self.ffn, 'ffn', train)
    return x_BLD, None

  def _residual(self, x_BLD: jax.Array, part, name: str, train: bool) -> jax.Array:
    def norm(when):
      return layers.norm(self.norm, self.norm_epsilon, self.bias, name=f'{name}_{when}_norm')

    h_BLD = x_BLD if self.norm_position == 'post' else norm('pre')(x_BLD)
    h_BLD = part(h_BLD)
    h_BLD = norm('post')(h_BLD) if self.norm_position == 'both' else h_BLD
    h_BLD = nn.Dropout(self.dropout, deterministic=not train)(h_BLD)
    y_BLD = x_BLD + h_BLD.astype(x_BLD.dtype)
    y_BLD = norm('post')(y_BLD) if self.norm_position == 'post' else y_BLD
    return nn.with_logical_constraint(y_BLD.astype(x_BLD.dtype), BETWEEN)


class Transformer(nn.Module):
  """The core of BERT, GPT and their kin."""

  depth: int | None = None  # blocks; these three may come from a size
  dim: int | None = None  # of the residual stream
  heads: int | None = None
  kv_heads: int | None = None  # fewer than heads: grouped-query attention; None: as many
  ffn_dim: int | None = None  # None: 4 dim
  max_length: int | None = None  # positions that learned positions know; None: the run's length
  positions: str = 'learned'  # learned, sinusoidal, rotary, alibi, relative, none
  rotary_base: float = 10_000.0  # the longest wavelength of rotary positions, over 2 pi
  ffn: str = 'gelu_tanh'  # gelu, gelu_tanh, relu, swiglu, geglu
  norm: str = 'layernorm'  # layernorm, rmsnorm
  norm_position: str = 'pre'  # pre, post (of the residual sum), both (around each part)
  norm_epsilon: float = 1e-5
  embed_norm: bool = False  # a norm on the embedded tokens, as in BERT
  bias: bool = True  # in projections and LayerNorms
  qk_norm: bool = False  # RMSNorm on queries and keys
  window: int = 0  # attend to fewer than this many places away; 0: to all
  vocab_multiple: int = 1  # the table's rows are rounded up to it, so that they divide over devices
  dropout: float = 0.0  # on embeddings and on what each part adds
  attention_dropout: float = 0.0  # on attention weights
  attention: str = 'auto'  # what computes it: auto, reference, splash, cudnn, triton
  initializer: str = 'gpt2'  # gpt2, bert, fan_in
  dtype: str = 'float32'  # of activations and products; parameters stay float32
  scan: bool = (
    True  # one compiled block for all layers; False unrolls: faster on CPU, slower to compile
  )
  remat: str = 'none'  # how little to keep for the backward pass: a key of REMAT

  def __post_init__(self):
    chosen = {
      'positions': POSITIONS,
      'ffn': layers.ACTIVATIONS,
      'attention': flash.BACKENDS,
      'norm': layers.NORMS,
      'norm_position': NORM_POSITIONS,
      'initializer': layers.INITS,
      'dtype': ('float32', 'bfloat16', 'float16'),
      'remat': REMAT,
    }
    for key, known in chosen.items():
      name = getattr(self, key)
      if name not in known:
        raise UserError(f'there is no model.{key} "{name}"{did_you_mean(name, known)}')
    for key in ('depth', 'dim', 'heads', 'kv_heads', 'ffn_dim', 'max_length', 'vocab_multiple'):
      if getattr(self, key) is not None and getattr(self, key) < 1:
        raise UserError(f'model.{key} = {getattr(self, key)} must be at least 1')
    for key in ('window', 'norm_epsilon'):
      if getattr(self, key) < 0:
        raise UserError(f'model.{key} = {getattr(self, key)} must be at least 0')
    if self.dim % self.heads:
      raise UserError(f'model.dim = {self.dim} does not divide into model.heads = {self.heads}')
    if self.heads % (self.kv_heads or self.heads):
      raise UserError(f'model.heads = {self.heads} is no multiple of kv_heads = {self.kv_heads}')
    if self.positions in ('rotary', 'sinusoidal') and (self.dim // self.heads) % 2:
      raise UserError(f'{self.positions} positions need an even model.dim / model.heads')
    if self.rotary_base <= 1:
      raise UserError(f'model.rotary_base = {self.rotary_base} must be above 1')
    if self.positions != 'rotary' and self.rotary_base != 10_000.0:
      unread = f'model.rotary_base = {self.rotary_base} is read by nothing'
      raise UserError(f'{unread} with {self.positions} positions')
    for key in ('dropout', 'attention_dropout'):
      if not 0 <= getattr(self, key) < 1:
        raise UserError(f'model.{key} = {getattr(self, key)} must be at least 0 and below 1')
    if self.attention in flash.KERNELS:
      biased = POSITIONS[self.positions].bias is not NoPositions.bias
      asked = dict(bias=biased, dropout=self.attention_dropout > 0, dtype=self.dtype)
      if why := flash.lacks(self.attention, head_dim=self.dim // self.heads, **asked):
        raise UserError(f'model.attention = "{self.attention}" cannot be: {why}')
    super().__post_init__()

  def small(self) -> dict[str, Any]:
    """Knobs of a core of the same parts that a CPU trains in no time."""
    heads = next(n for n in (4, 2, 1) if n <= self.heads)
    grouped = heads if self.kv_heads == self.heads else min(self.kv_heads or heads, heads // 2 or 1)
    return {
      'size': '',
      'depth': min(self.depth, 2),
      'dim': 32,
      'heads': heads,
      'kv_heads': self.kv_heads and grouped,
      'ffn_dim': self.ffn_dim and 64,
      'max_length': None,
      'window': self.window and min(max(self.window, 2), 16),
      'vocab_multiple': 8,
      'attention': 'reference',
      'dtype': 'float32',
      'scan': True,
      'remat': 'none',
    }

  def attention_flops(self, rows: int, length: int, causal: bool) -> tuple[int, int]:
    """Of both products, forward: (of all pairs of places, of those that the mask lets see).

    Where documents or padding end is not known ahead of them.
    """
    each = 4 * rows * self.dim * self.depth
    return each * length**2, each * Mask(causal, window=self.window).pairs(length)

  def setup(self):
    initializers = layers.Initializers(self.initializer, self.depth)
    positions = POSITIONS[self.positions]
    self.position = positions(self.dim, self.heads, self.max_length, initializers)
    norm = lambda: layers.norm(self.norm, self.norm_epsilon, self.bias)
    self.input_norm = norm() if self.embed_norm else (lambda x_BLD: x_BLD)
    self.output_norm = (lambda x_BLD: x_BLD) if self.norm_position == 'post' else norm()
    self.input_dropout = nn.Dropout(self.dropout)
    self.blocks = self._stack(initializers)

  def _stack(self, initializers: layers.Initializers) -> nn.Module:
    """`depth` blocks whose parameters are stacked along the axis `layers`, scanned or unrolled."""
    block = Block
    if self.remat != 'none' or shards.sharded():
      policy = REMAT[self.remat]
      block = nn.remat(Block, policy=policy, prevent_cse=not self.scan, static_argnums=(5, 6))
    dtype = jnp.dtype(self.dtype)
    parts = dict(initializers=initializers, bias=self.bias, dtype=dtype)
    stack = nn.scan(
      block,
      variable_axes={'params': 0, 'cache': 0, 'intermediates': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=nn.broadcast,
      length=self.depth,
      unroll=1 if self.scan else self.depth,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return stack(
      attention=Attention(
        self.dim,
        self.heads,
        self.kv_heads or self.heads,
        POSITIONS[self.positions].rotate,
        self.rotary_base,
        qk_norm=self.qk_norm,
        window=self.window,
        dropout=self.attention_dropout,
        backend=self.attention,
        parent=None,
        **parts,
      ),
      ffn=layers.FeedForward(
        self.dim, self.ffn_dim or 4 * self.dim, self.ffn, parent=None, **parts
      ),
      norm=self.norm,
      norm_position=self.norm_position,
      norm_epsilon=self.norm_epsilon,
      bias=self.bias,
      dropout=self.dropout,
    )

  def __call__(
    self,
    x_BLD: jax.Array,
    mask: Mask,
    train: bool,
    positions_BL: jax.Array | None = None,
    cache_length: int = 0,
  ) -> jax.Array:
    """Contextual vectors [B, L, D] in float32.

    positions_BL: the place of each token in its text; None: 0, 1, 2, …
    cache_length: with a mutable collection `cache`, keys and values of up to so many tokens are
      kept from call to call, and x_BLD holds the tokens that come next.
    """
    if positions_BL is None:
      positions_BL = jnp.arange(x_BLD.shape[1])[None]
    keys_BS = jnp.arange(cache_length)[None] if cache_length else positions_BL
    bias_BNLS = self.position.bias(positions_BL, keys_BS, mask.causal)
    x_BLD = self.input_norm(self.position.add(x_BLD, positions_BL))
    x_BLD = self.input_dropout(x_BLD, deterministic=not train).astype(self.dtype)
    x_BLD = nn.with_logical_constraint(x_BLD, BETWEEN)
    x_BLD, _ = self.blocks(x_BLD, mask, positions_BL, bias_BNLS, train, cache_length)
    return self.output_norm(x_BLD).astype(jnp.float32)
