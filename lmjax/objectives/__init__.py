"""An objective: how an example is made of text, and what is minimised on a batch; one file each.

`objectives/NAME.py` holds a frozen dataclass `Objective`; its fields are the keys of the config's
section `objective`.  It has

  examples(store, tokenizer, length, seed, train=True) -> Examples
      on the host, NumPy: `len(examples)` rows an epoch, and `examples(indices, epochs)` makes any
      of them.  They depend on nothing else, so that a batch is a function of the step.
      `examples.spans`, int64[n, 2], are the stretches of the store that its rows are made of.
      train=False gives the fixed examples on which runs are compared.
  model(core, vocab_size) -> linen Module
      called as module(batch, train) -> (terms, metrics), both dict[str, Mean].  The loss is the sum
      of the terms' means over the global batch.  A metric `xent`, the plain cross-entropy of the
      predicted tokens, gives perplexity, and bits per byte where every token is scored.
  check(tokenizer, length, core)
      raises a UserError where the parts do not fit, before any work is done.
  ignorant(vocab_size) -> dict[str, float]
      what each term is for a model that knows nothing, which one that begins should be near.
  causal: whether the model continues texts.  It has a method `logits` (see clm.py): [B, L, V], at
      each place of the token after it, or, where it does not continue texts, of its own.
  scores_every_token: whether `xent` is of all tokens of a text, so that it has bits per byte.
  separates: whether rows hold texts that do not see each other, told apart by `segments`.
  rate, predictions: the share of a row's ordinary tokens that become targets in `places`, and how
      many do at most (None: as many as that).  Rounded, it is one at least; whole words may lack
      one.
  visible, mask_share: of those targets, the ones that are there to be seen, or masked.
  counts_tokens: the fields that are numbers of tokens, which shrink with the rows.

A batch is dict[str, array] with the rows in front.  Keys that end in `weights` are loss weights: 0
marks what is not there.  `segments`, where there are any, are 0 at padding.  Losses are in nats.
`targets` are token ids: of the places of a row one by one, or of those in `places`, indices into
it.  NAME_places, NAME_targets and NAME_weights are classes.  By this the oracles of lmjax.check and
`data show` know any objective.
"""

import importlib
import pathlib
from typing import Any

from lmjax.config import did_you_mean
from lmjax.errors import UserError


def get(name: str, **kwargs: Any):
  """The objective `name`, found by its file."""
  known = [p.stem for p in pathlib.Path(__file__).parent.glob('[a-z]*.py')]
  if name not in known:
    raise UserError(f'there is no objective "{name}"{did_you_mean(name, known)}')
  return importlib.import_module(f'lmjax.objectives.{name}').Objective(**kwargs)
