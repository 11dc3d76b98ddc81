"""Cores: linen Modules from embedded tokens to contextual vectors, which know no objective.

It is called as `core(x_BLD, mask, train, positions_BL=None, cache_length=0) -> x_BLD`.  It is found
by its file's name, `transformer` is `transformer.Transformer`, and beside it is a table SIZES.
It has the attributes dim, depth, max_length, norm, norm_epsilon, bias, initializer and dtype, by
which an objective makes embeddings and heads that match; `attention_flops`, what the products of
queries, keys and values cost; and `small`, the knobs of a core of the same parts that the oracles
of lmjax.check try.
"""

import importlib
from typing import Any

from flax import linen as nn

from lmjax.config import did_you_mean
from lmjax.errors import UserError


def get(name: str, size: str = '', **kwargs: Any) -> nn.Module:
  """The core `name`; a `size` fills in the dimensions that are None.

  Raises:
    UserError: an unknown size, a dimension that neither the size nor the config gives.
  """
  module = importlib.import_module(f'lmjax.models.{name}')
  if size and size not in module.SIZES:
    raise UserError(f'there is no model.size "{size}"{did_you_mean(size, module.SIZES)}')
  dimensions = module.SIZES[size] if size else {}
  given = {key: value for key, value in kwargs.items() if value is not None}
  core = dimensions | given
  for key in ('depth', 'dim', 'heads'):
    if key not in core:
      raise UserError(f'model.{key} is not set: name a model.size, or set depth, dim and heads')
  return getattr(module, name.title())(**core)
