"""Numbers that models of different objectives share: how well each predicts the same tokens.

The set `yardstick` are windows of the first evaluation set, the same for all models with the same
tokenizer and at least as long rows.  In each,

  masked_xent, masked_accuracy   are of 15 % of the tokens.  A masked model sees the others on both
      sides, and these as [MASK], all at once; a causal one sees what stands before each in the
      window.
  pseudo_xent   is of every token.  A masked model sees all others of the window, one row a token
      (the pseudo-log-likelihood of Salazar et al., 2020), and a causal one what stands before it,
      so that here it is a log-likelihood.  Only the latter is a probability of the text: what the
      two say is how much each can tell from what it may see.
  pseudo_bits_per_byte   is that for a byte of the text, where tokens lose none of it.

B rows, L length, W tokens of a window, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data import corrupt, loader, pack
from lmjax.errors import UserError
from lmjax.experiment import Experiment
from lmjax.metrics import Mean

NAME, RATE, WIDTH = 'yardstick', 0.15, 62  # with [CLS] and [SEP] a window is a row of 64
NUMBERS = ('masked_xent', 'masked_accuracy', 'pseudo_xent', 'pseudo_bits_per_byte')


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """Rows of windows: of a causal model one for both numbers, of a masked one 1 + W."""

  parts: Experiment
  windows: np.ndarray  # int32[n, 1 + W], each with the token before it

  @property
  def width(self) -> int:
    return self.windows.shape[1] - 1

  @property
  def _each(self) -> int:
    return 1 if self.parts.objective.causal else 1 + self.width

  def __len__(self) -> int:
    return len(self.windows) * self._each

  def __call__(self, indices: np.ndarray, epochs: np.ndarray) -> loader.Batch:
    window, turn = np.divmod(indices, self._each)
    tokens, ordinary = self.windows[window], ~self.parts.tokenizer.special
    clean = tokens[:, 1:]
    candidates = ordinary[clean]
    counts = np.rint(candidates.sum(axis=1) * RATE).astype(np.int64).clip(1)
    chosen = corrupt.choose_tokens(
      candidates, counts, corrupt.keys(0, window, np.zeros_like(window))
    )
    if self.parts.objective.causal:
      return self._batch(tokens[:, :-1], clean, chosen, candidates)
    one = (np.arange(self.width) == turn[:, None] - 1) & candidates
    chosen &= turn[:, None] == 0
    hidden = np.where(chosen | one, self.parts.tokenizer.mask, clean)
    framed = lambda x: np.pad(x, ((0, 0), (1, 1)))
    tokens = framed(hidden)
    tokens[:, [0, -1]] = self.parts.tokenizer.cls, self.parts.tokenizer.sep
    return self._batch(tokens, framed(clean), framed(chosen), framed(one))

  def _batch(self, tokens, targets, masked, every) -> loader.Batch:
    batch = {'tokens': tokens, 'targets': targets}
    if self.parts.objective.separates:
      real, eos = np.ones(tokens.shape, bool), self.parts.tokenizer.eos
      segments, positions = pack.document_segments(tokens, real, eos)
      batch |= {'segments': segments, 'positions': positions}
    weights = {'masked_weights': masked, 'every_weights': every}
    made = batch | {key: x.astype(np.float32) for key, x in weights.items()}
    return {key: np.ascontiguousarray(x) for key, x in made.items()}


def rows(parts: Experiment) -> Rows:
  """Of as many windows as evaluate.yardstick says, evenly spread over the text.

  Raises:
    UserError: there is no evaluation set, or it or the model's rows are too short.
  """
  sets, count = [*parts.config['data']['eval']], parts.config['evaluate'][NAME]
  if not sets:
    raise UserError('evaluate.yardstick needs an evaluation set')
  if parts.config['length'] < WIDTH + 2:
    raise UserError(f'evaluate.yardstick needs length = {WIDTH + 2} or more')
  store = parts.stores[sets[0]]
  last = len(store) - WIDTH - 1
  if last < count:
    raise UserError(f'the set {sets[0]} is too short for evaluate.yardstick = {count} windows')
  return Rows(parts, pack.windows(store, np.linspace(0, last, count).astype(np.int64), WIDTH + 1))


def make_step(parts: Experiment) -> Callable:
  """(parameters, batch) -> sums of the numbers, compiled when it is first called."""

  def step(params, batch):
    inputs = {f'{key}_BL': batch[key] for key in ('segments', 'positions') if key in batch}
    logits_BLV = parts.model.apply(
      {'params': params}, batch['tokens'], **inputs, method='logits'
    ).astype(jnp.float32)
    targets_BL = batch['targets']
    logs_BLV = jax.nn.log_softmax(logits_BLV)
    nats_BL = -jnp.take_along_axis(logs_BLV, targets_BL[..., None], axis=-1)[..., 0]
    right_BL = logits_BLV.argmax(axis=-1) == targets_BL
    mean = lambda x_BL, weights_BL: Mean((x_BL * weights_BL).sum(), weights_BL.sum())
    masked_BL, every_BL = batch['masked_weights'], batch['every_weights']
    return {
      'masked_xent': mean(nats_BL, masked_BL),
      'masked_accuracy': mean(right_BL, masked_BL),
      'pseudo_xent': mean(nats_BL, every_BL),
    }

  return jax.jit(step)


def values(parts: Experiment, fetched: list[Any]) -> dict[str, float]:
  """The numbers of all rows."""
  sums = jax.tree.map(lambda *x: math.fsum(map(float, x)), *fetched)
  found = {key: mean.compute() for key, mean in sums.items()}
  if parts.tokenizer.lossless:
    store = parts.stores[next(iter(parts.config['data']['eval']))]
    bits = found['pseudo_xent'] / math.log(2)
    found['pseudo_bits_per_byte'] = bits * len(store) / store.num_bytes
  return found
