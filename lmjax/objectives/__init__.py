"""An objective: how an example is made of text, and what is minimised on a batch; one file each.

`objectives/NAME.py` holds a frozen dataclass `Objective`; its fields are the keys of the config's
section `objective`.  It has

  examples(store, tokenizer, length, seed, train=True) -> Examples
      on the host, NumPy: `len(examples)` rows an epoch, and `examples(indices, epochs)` makes any
      of them.  They depend on nothing else, so that a batch is a function of the step.
      train=False gives the fixed examples on which runs are compared.
  model(core, vocab_size) -> linen Module
      called as module(batch, train) -> (terms, metrics), both dict[str, Mean].  The loss is the sum
      of the terms' means over the global batch.
  check(tokenizer, length, core)
      raises a UserError where the parts do not fit, before any work is done.
  causal, scores_every_token: what generation and bits per byte need to know.

A batch is dict[str, array] with the rows in front.  Keys that end in `weights` are loss weights: 0
marks what is not there.  Losses are in nats.
"""

import importlib
import pathlib
from typing import Any

from lmjax.config import UserError, did_you_mean


def get(name: str, **kwargs: Any):
  """The objective `name`, found by its file."""
  known = [p.stem for p in pathlib.Path(__file__).parent.glob('[a-z]*.py')]
  if name not in known:
    raise UserError(f'there is no objective "{name}"{did_you_mean(name, known)}')
  return importlib.import_module(f'lmjax.objectives.{name}').Objective(**kwargs)
