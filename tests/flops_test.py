"""The FLOPs that MFU and plans are made of are those that XLA counts in an unrolled program."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from lmjax.models import heads, layers
from lmjax.models.attention import Mask
from lmjax.models.positions import POSITIONS
from tests.contract_test import OBJECTIVES

# No loop, nothing twice, and so wide that what is no product does not matter.
SIZES = {'model.dim': 512, 'model.heads': 4, 'model.scan': False, 'length': 128}
KINDS = {
  **{name: (name, {}) for name in OBJECTIVES},
  **{f'{p} positions': ('clm', {'model.positions': p}) for p in POSITIONS},
  **{f'{ffn}': ('mlm', {'model.ffn': ffn}) for ffn in layers.ACTIVATIONS},
  'fewer keys': ('clm', {'model.kv_heads': 2, 'model.ffn_dim': 768}),
  'window': ('clm', {'model.window': 16}),
}


@pytest.mark.parametrize('kind', KINDS)
def test_flops_are_those_that_xla_counts(parts, monkeypatch, kind):
  monkeypatch.setattr(heads, 'CHUNK', 1 << 40)  # nor a loop in the loss
  name, overrides = KINDS[kind]
  objective, own = OBJECTIVES[name]
  made = parts(objective, **{**own, **SIZES, **overrides})

  def loss(params, batch):
    terms, _ = made.model.apply({'params': params}, batch, train=False)
    return sum(term.total / term.weight for term in terms.values())

  params = nn.unbox(made.boxed_shapes)
  counted = jax.jit(jax.grad(loss)).lower(params, made.abstract_batch()).cost_analysis()['flops']
  unmasked = made.flops.dense + 3 * made.flops.every
  assert unmasked == pytest.approx(counted, rel=0.03)
  assert (made.flops.model < unmasked) == (objective == 'clm')


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('window', [0, 1, 3, 12, 20])
def test_pairs_are_the_places_of_the_mask(causal, window):
  mask = Mask(causal, window=window)
  assert mask.pairs(12) == np.sum(mask.array(12, 12))
