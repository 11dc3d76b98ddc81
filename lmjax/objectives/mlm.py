"""Masked language modelling, with sentence pairs or without (Devlin et al.; Liu et al., 2019).

Batch: tokens_BL (corrupted), segments_BL (0 is padding), places_BK (what is predicted), targets_BK,
weights_BK; where documents or pairs share a row also positions_BL; with sentence pairs types_BL (0
or 1: first or second half), pair_places_BP (of [CLS]), pair_targets_BP, pair_weights_BP.
B batch, L length, K predictions, P pairs, D model, V vocabulary.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lmjax.config import did_you_mean
from lmjax.data import corrupt, pack
from lmjax.data.pieces import Tokenizer
from lmjax.data.store import Store
from lmjax.errors import UserError
from lmjax.metrics import Mean
from lmjax.models import heads, layers
from lmjax.models.attention import Mask

MASKING = ('token', 'word', 'span')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  rate: float = 0.15  # share of the tokens that are predicted
  mask_share: float = 0.8  # of those, so many become [MASK] …
  random_share: float = 0.1  # … and so many a random token; the rest stays as it is
  masking: str = 'token'  # what is chosen as a whole: token, word, span
  predictions: int | None = None  # places K kept in a row for them; None: rate x length, rounded up
  dynamic: bool = True  # new masks in every epoch; False: those of the first, as in the original
  dupe_factor: int = 1  # copies of the corpus, each with masks and pairs of its own
  next_sentence: bool = False  # sentence pairs: does the second follow the first?  (BERT)
  sentence_order: bool = False  # sentence pairs: are they in order?  (ALBERT; Lan et al., 2020)
  short_seq_prob: float = 0.1  # pairs: share of documents with rows of a shorter, random length
  pairs_per_row: int = 1  # pairs: at most so many share a row, one [CLS] each
  pair_length: int | None = None  # pairs: tokens in a pair at most; None: the row's length
  separate_documents: bool = False  # without pairs: attention never crosses documents
  types: bool = False  # a vector for each half is added also without pairs, where all is the first
  tied: bool = True  # the output layer is the transposed embedding table
  label_smoothing: float = 0.0  # share of the target spread over the vocabulary
  z_loss: float = 0.0  # weight of log(Z)^2

  causal: ClassVar[bool] = False
  scores_every_token: ClassVar[bool] = False
  counts_tokens: ClassVar[tuple[str, ...]] = ('predictions', 'pair_length')

  @property
  def pairs(self) -> bool:
    return self.next_sentence or self.sentence_order

  @property
  def separates(self) -> bool:
    return self.separate_documents or self.pairs_per_row > 1

  @property
  def visible(self) -> float:
    """The share of targets that the model is shown where it is to predict them."""
    return 1 - self.mask_share - self.random_share

  def __post_init__(self):
    if self.masking not in MASKING:
      known = did_you_mean(self.masking, MASKING)
      raise UserError(f'there is no objective.masking "{self.masking}"{known}')
    for key in ('rate', 'mask_share', 'random_share', 'short_seq_prob', 'label_smoothing'):
      if not 0 <= getattr(self, key) <= 1:
        raise UserError(f'objective.{key} = {getattr(self, key)} is not in [0, 1]')
    if self.z_loss < 0:
      raise UserError(f'objective.z_loss = {self.z_loss} must be at least 0')
    if self.rate == 0 or self.mask_share + self.random_share > 1:
      raise UserError('objective: rate must be above 0, and mask_share + random_share at most 1')
    if self.next_sentence and self.sentence_order:
      raise UserError('objective: next_sentence and sentence_order exclude each other')
    for key in ('dupe_factor', 'pairs_per_row', 'predictions', 'pair_length'):
      if getattr(self, key) is not None and getattr(self, key) < 1:
        raise UserError(f'objective.{key} = {getattr(self, key)} must be at least 1')
    unread = ('short_seq_prob', 'pairs_per_row', 'pair_length')
    self._refuse_unread(() if self.pairs else unread, 'neither next_sentence nor sentence_order')
    self._refuse_unread(('separate_documents', 'types') if self.pairs else (), 'sentence pairs')
    if not self.pairs and self.dynamic:
      self._refuse_unread(('dupe_factor',), 'dynamic masks, which differ in every epoch anyway')

  def _refuse_unread(self, keys: tuple[str, ...], why: str) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(self)}
    for key in keys:
      if getattr(self, key) != defaults[key]:
        raise UserError(f'objective.{key} = {getattr(self, key)} is read by nothing with {why}')

  def check(self, tokenizer: Tokenizer, length: int, core: nn.Module) -> None:
    for token in ('mask', 'cls', 'sep', 'pad'):
      if getattr(tokenizer, token) is None:
        raise UserError(f'mlm needs a {token} token, and the {tokenizer.name} vocabulary has none')
    if self.pairs and (self.pair_length or length) < 5:
      raise UserError(f'length {self.pair_length or length} has no room for a pair of sentences')
    if (self.pair_length or 0) > length:
      raise UserError(f'objective.pair_length = {self.pair_length} exceeds length = {length}')
    if length < 3:
      raise UserError(f'length = {length} has no room for a token between [CLS] and [SEP]')

  def examples(
    self, store: Store, tokenizer: Tokenizer, length: int, seed: int, train: bool = True
  ) -> 'Rows':
    """train=False: 15 % of the tokens, one by one, corrupted alike in every run."""
    objective = self
    if not train:
      fixed = dict(rate=0.15, masking='token', predictions=None, dynamic=False, dupe_factor=1)
      fixed |= dict(mask_share=0.8, random_share=0.1, short_seq_prob=0.1)
      objective, seed = dataclasses.replace(self, **fixed), 0
    return Rows(objective, store, tokenizer, length, seed)

  def ignorant(self, vocab_size: int) -> dict[str, float]:
    nats = math.log(vocab_size)
    pairs = {'nsp': math.log(2)} if self.pairs else {}
    return {'mlm': nats + self.z_loss * nats**2, **pairs}

  def model(self, core: nn.Module, vocab_size: int) -> nn.Module:
    return MaskedLM(core, vocab_size, self)


class Rows:
  """Rows of full sentences, [CLS] … [SEP], or of sentence pairs, [CLS] A [SEP] B [SEP]."""

  def __init__(
    self, objective: Objective, store: Store, tokenizer: Tokenizer, length: int, seed: int
  ):
    self.objective, self.store, self.tokenizer = objective, store, tokenizer
    self.length, self.seed = length, seed
    self.k = objective.predictions or math.ceil(objective.rate * length)
    self.is_ordinary = ~tokenizer.special
    self.ordinary = np.flatnonzero(self.is_ordinary)
    if objective.pairs:
      self._plan_pairs()
    else:
      bounds = pack.sentence_windows(store, length - 2)
      self.items = np.stack([bounds[:-1], bounds[1:]], axis=1)

  def _plan_pairs(self) -> None:
    o, store = self.objective, self.store
    documents = np.diff(np.searchsorted(store.sentences, store.documents))
    if o.next_sentence and (documents > 0).sum() < 2:
      raise UserError('next_sentence needs at least two documents, to take negatives from another')
    capacity = (o.pair_length or self.length) - 3
    self.pairs = pack.sentence_pairs(
      store, capacity, self.seed, o.short_seq_prob, o.dupe_factor, o.sentence_order
    )
    lengths = self.pairs[:, 1] - self.pairs[:, 0] + self.pairs[:, 3] - self.pairs[:, 2] + 3
    self.items = pack.pack_rows(lengths, self.length, o.pairs_per_row)

  @property
  def spans(self) -> np.ndarray:
    return self.pairs[:, :4].reshape(-1, 2) if self.objective.pairs else self.items

  def __len__(self) -> int:
    # The plan of pairs holds the copies already.
    return len(self.items) * (1 if self.objective.pairs else self.objective.dupe_factor)

  def __call__(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
    o = self.objective
    make = self._pair_rows if o.pairs else self._sentence_rows
    clean, batch = make(self.items[indices % len(self.items)])
    candidates = np.take(self.is_ordinary, clean)
    noise = corrupt.keys(self.seed, indices, epochs if o.dynamic else np.zeros_like(epochs))
    counts = np.rint(candidates.sum(axis=1) * o.rate).astype(np.int64).clip(1, self.k)
    chosen = self._choose(candidates, counts, clean, noise)
    places, weights = corrupt.gather_places(chosen, self.k)
    mask, shares = self.tokenizer.mask, (o.mask_share, o.random_share)
    return batch | {
      'tokens': corrupt.replace(clean, chosen, mask, self.ordinary, shares, noise),
      'places': places,
      'targets': clean[np.arange(len(clean))[:, None], places],
      'weights': weights,
    }

  def _choose(self, candidates, counts, clean, noise) -> np.ndarray:
    if self.objective.masking == 'token':
      return corrupt.choose_tokens(candidates, counts, noise)
    choose = {'word': corrupt.choose_words, 'span': corrupt.choose_spans}[self.objective.masking]
    return choose(candidates, counts, self.tokenizer.starts_word[clean], noise)

  def _sentence_rows(self, items: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    tokens = pack.spans(self.store, items, self.length, self.tokenizer)
    real = tokens != self.tokenizer.pad
    if not self.objective.separate_documents:
      return tokens, {'segments': real.astype(np.int32)}
    segments, positions = pack.document_segments(tokens, real, self.tokenizer.eos)
    return tokens, {'segments': segments, 'positions': positions}

  def _pair_rows(self, items: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    o, t = self.objective, self.tokenizer
    tokens = np.full((len(items), self.length), t.pad, np.int32)
    segments, positions, types = (np.zeros_like(tokens) for _ in range(3))
    pair_places, pair_targets = np.zeros((2, *items.shape), np.int32)
    for row, item in enumerate(items):
      place = 0
      for slot, pair in enumerate(self.pairs[item[item >= 0]]):
        a0, a1, b0, b1, label = pair.tolist()
        n_a, n = a1 - a0 + 2, a1 - a0 + b1 - b0 + 3
        at = slice(place, place + n)
        tokens[row, place] = t.cls
        tokens[row, place + 1 : place + n_a - 1] = self.store.read(a0, a1)
        tokens[row, place + n_a - 1] = t.sep
        tokens[row, place + n_a : place + n - 1] = self.store.read(b0, b1)
        tokens[row, place + n - 1] = t.sep
        segments[row, at] = slot + 1
        positions[row, at] = np.arange(n)
        types[row, place + n_a : place + n] = 1
        pair_places[row, slot], pair_targets[row, slot] = place, label
        place += n
    batch = {'segments': segments, 'types': types, 'pair_places': pair_places}
    batch |= {'pair_targets': pair_targets, 'pair_weights': (items >= 0).astype(np.float32)}
    return tokens, batch | ({'positions': positions} if o.pairs_per_row > 1 else {})


class MaskedLM(nn.Module):
  core: nn.Module
  vocab_size: int
  objective: Objective

  def setup(self):
    core, o = self.core, self.objective
    init, dtype = layers.Initializers(core.initializer, core.depth), jnp.dtype(core.dtype)
    d, rows = core.dim, heads.table_rows(self.vocab_size, core.vocab_multiple)
    self.embed = layers.Embed(rows, d, ('vocab', 'embed'), init, dtype=dtype)
    self.transform = layers.Linear((d,), (d,), ('embed', 'mlp'), init, dtype=dtype)
    self.transform_norm = layers.norm(core.norm, core.norm_epsilon, core.bias)
    self.head = heads.TokenHead(self.vocab_size, rows, d, o.tied, True, init, dtype)
    if o.pairs or o.types:
      self.types = layers.Embed(2, d, ('types', 'embed'), init, dtype=dtype)
    if o.pairs:
      self.classifier = heads.Classifier(2, init, dtype)

  def encode(
    self,
    tokens_BL: jax.Array,
    segments_BL: jax.Array | None = None,
    types_BL: jax.Array | None = None,
    positions_BL: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Contextual vectors [B, L, D].

    Without segments_BL there is no padding, which is else at the end of a row; without types_BL all
    is of the first type.
    """
    o, x_BLD, mask = self.objective, self.embed(tokens_BL), Mask(causal=False)
    if o.pairs or o.types:
      x_BLD += self.types(jnp.zeros_like(tokens_BL) if types_BL is None else types_BL)
    if segments_BL is not None and (o.pairs_per_row > 1 or o.separate_documents):
      mask = Mask(causal=False, segments_BL=segments_BL)
    elif segments_BL is not None:  # a text and padding after it, which more kernels know
      mask = Mask(causal=False, lengths_B=(segments_BL > 0).sum(axis=1))
    return self.core(x_BLD, mask, train, positions_BL)

  def logits(self, *args, **kwargs) -> jax.Array:
    """[B, L, V]: at each place the distribution of its token; arguments of encode."""
    return self.head(self._transformed(self.encode(*args, **kwargs)), self.embed)

  def pooled(self, *args, **kwargs) -> tuple[jax.Array, jax.Array]:
    """(vector [B, D] of the first place, logits [B, 2] of its class); arguments of encode.

    Of models with sentence pairs.
    """
    pooled_BPD, logits_BPC = self.classifier(self.encode(*args, **kwargs)[:, :1])
    return pooled_BPD[:, 0], logits_BPC[:, 0]

  def _transformed(self, x_BKD: jax.Array) -> jax.Array:
    return self.transform_norm(nn.gelu(self.transform(x_BKD), approximate=False))

  def __call__(self, batch: dict[str, jax.Array], train: bool) -> tuple[dict[str, Mean], ...]:
    o, inputs = self.objective, ('tokens', 'segments', 'types', 'positions')
    x_BLD = self.encode(*map(batch.get, inputs), train)
    # Only the chosen places meet the vocabulary: K of L rows of the largest product.
    x_BKD = jnp.take_along_axis(x_BLD, batch['places'][..., None], axis=1)
    x_BKD = self._transformed(x_BKD)
    loss, xent, accuracy = self.head.loss(
      x_BKD, self.embed, batch['targets'], batch['weights'], o.label_smoothing, o.z_loss
    )
    terms, metrics = {'mlm': loss}, {'xent': xent, 'mlm_accuracy': accuracy}
    if o.pairs:
      x_BPD = jnp.take_along_axis(x_BLD, batch['pair_places'][..., None], axis=1)
      _, logits_BPC = self.classifier(x_BPD)
      terms['nsp'], _, metrics['nsp_accuracy'] = heads.cross_entropy(
        logits_BPC, batch['pair_targets'], batch['pair_weights']
      )
    return terms, metrics
