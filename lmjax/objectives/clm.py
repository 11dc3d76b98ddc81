"""Causal language modelling: each token is predicted from those before it.  Radford et al., 2019.

Batch: tokens_BL, targets_BL, weights_BL; with separate_documents also segments_BL, positions_BL.
B batch, L length, D model, V vocabulary.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lmjax.data import corrupt, pack
from lmjax.data.pieces import Tokenizer
from lmjax.data.store import Store
from lmjax.errors import UserError
from lmjax.metrics import Mean
from lmjax.models import heads, layers
from lmjax.models.attention import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  separate_documents: bool = False  # attention never crosses documents, and positions restart
  tied: bool = True  # the output layer is the transposed embedding table
  label_smoothing: float = 0.0  # share of the target spread over the vocabulary
  z_loss: float = 0.0  # weight of log(Z)^2; 1e-4 in PaLM

  causal: ClassVar[bool] = True
  scores_every_token: ClassVar[bool] = True
  counts_tokens: ClassVar[tuple[str, ...]] = ()

  def __post_init__(self):
    if self.z_loss < 0:
      raise UserError(f'objective.z_loss = {self.z_loss} must be at least 0')
    if not 0 <= self.label_smoothing < 1:
      raise UserError(f'objective.label_smoothing = {self.label_smoothing} is not in [0, 1)')

  @property
  def separates(self) -> bool:
    return self.separate_documents

  def check(self, tokenizer: Tokenizer, length: int, core: nn.Module) -> None:
    if tokenizer.eos is None:
      raise UserError(
        f'clm needs an end-of-text token, and the {tokenizer.name} vocabulary has none'
      )

  def examples(
    self, store: Store, tokenizer: Tokenizer, length: int, seed: int, train: bool = True
  ) -> 'Windows':
    return Windows(store, tokenizer, length, seed, train, self.separate_documents)

  def ignorant(self, vocab_size: int) -> dict[str, float]:
    nats = math.log(vocab_size)
    return {'clm': nats + self.z_loss * nats**2}

  def model(self, core: nn.Module, vocab_size: int) -> nn.Module:
    return CausalLM(core, vocab_size, self)


@dataclasses.dataclass(frozen=True)
class Windows:
  """The documents end to end, cut into windows of `length` inputs and as many targets.

  In training they are a ring, whose cuts move from epoch to epoch, and each token is a target once
  an epoch.  In evaluation the first token, which nothing precedes, is none.  The last window is
  padded.
  """

  store: Store
  tokenizer: Tokenizer
  length: int
  seed: int
  train: bool
  separate_documents: bool

  @property
  def _targets(self) -> int:
    return len(self.store) - (0 if self.train else 1)

  @property
  def spans(self) -> np.ndarray:
    return np.array([[0, len(self.store)]])

  def __len__(self) -> int:
    return -(-self._targets // self.length)

  def __call__(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
    starts = indices * self.length
    weights = np.ones((len(starts), self.length), np.float32)
    counts = np.minimum(self._targets - starts, self.length)
    if self.train:
      starts = starts + [corrupt.epoch_key(self.seed, e) % len(self.store) for e in epochs.tolist()]
    tokens = pack.windows(self.store, starts, self.length + 1)
    for row in np.flatnonzero(counts < self.length):
      tokens[row, counts[row] + 1 :] = self.tokenizer.pad or 0
      weights[row, counts[row] :] = 0
    batch = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': weights}
    if self.separate_documents:
      eos = self.tokenizer.eos
      segments, positions = pack.document_segments(batch['tokens'], weights > 0, eos)
      batch |= {'segments': segments, 'positions': positions}
    return batch


class CausalLM(nn.Module):
  core: nn.Module
  vocab_size: int
  objective: Objective

  def setup(self):
    core, d = self.core, self.core.dim
    init, dtype = layers.Initializers(core.initializer, core.depth), jnp.dtype(core.dtype)
    rows = heads.table_rows(self.vocab_size, core.vocab_multiple)
    self.embed = layers.Embed(rows, d, ('vocab', 'embed'), init, dtype=dtype)
    tied = self.objective.tied
    self.head = heads.TokenHead(self.vocab_size, rows, d, tied, False, init, dtype)

  def encode(
    self,
    tokens_BL: jax.Array,
    segments_BL: jax.Array | None = None,
    positions_BL: jax.Array | None = None,
    train: bool = False,
    cache_length: int = 0,
  ) -> jax.Array:
    """Contextual vectors [B, L, D]."""
    mask = Mask(causal=True, segments_BL=segments_BL)
    return self.core(self.embed(tokens_BL), mask, train, positions_BL, cache_length)

  def logits(self, *args, **kwargs) -> jax.Array:
    """[B, L, V]: at each place the distribution of the token after it; arguments of encode."""
    return self.head(self.encode(*args, **kwargs), self.embed)

  def __call__(self, batch: dict[str, jax.Array], train: bool) -> tuple[dict[str, Mean], ...]:
    segments_BL, positions_BL = batch.get('segments'), batch.get('positions')
    x_BLD, o = self.encode(batch['tokens'], segments_BL, positions_BL, train), self.objective
    loss, xent, accuracy = self.head.loss(
      x_BLD, self.embed, batch['targets'], batch['weights'], o.label_smoothing, o.z_loss
    )
    return {'clm': loss}, {'xent': xent, 'accuracy': accuracy}
