"""The first losses, pinned.  A refactor shows the same numbers; whoever moves them says why."""

import numpy as np
import pytest

from tests.invariance_test import curve

# Losses of steps 1 to 3, float32 on one CPU device.
GOLDEN = {
  'clm': (
    'clm',
    {'objective.separate_documents': True, 'model.positions': 'rotary'},
    [5.560708, 5.443545, 5.252497],
  ),
  'mlm': (
    'mlm',
    {'objective.masking': 'word', 'model.ffn': 'swiglu'},
    [5.574874, 5.560106, 5.302081],
  ),
  'bert': (
    'mlm',
    {'objective.next_sentence': True, 'model.norm_position': 'post'},
    [5.567472, 5.510382, 5.299998],
  ),
}


@pytest.mark.parametrize('name', GOLDEN)
def test_first_losses(parts, name):
  objective, overrides, expected = GOLDEN[name]
  got = curve(parts(objective, **overrides), 1, steps=3)[:, 0]
  np.testing.assert_allclose(
    got,
    expected,
    rtol=1e-4,
    err_msg='The numbers of a training run have changed.  If that was not meant, this is a bug: '
    'look at data order, initialisation, masks, the loss and the optimizer.  If it was meant, put '
    'the new numbers here and say in the commit what changed them.',
  )
