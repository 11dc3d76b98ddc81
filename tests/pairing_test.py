"""What arms of an ablation share, by path and shape, begins with the same numbers."""

import itertools

import jax
import numpy as np
import pytest
from flax import linen as nn

from lmjax import config, experiment, fingerprint

# Overrides of an arm -> how many arrays it shares with the reference.
ARMS = {
  'without biases': ({'model.bias': False}, 11),
  'another norm': ({'model.norm': 'rmsnorm'}, 17),
  'norms elsewhere': ({'model.norm_position': 'post'}, 14),
  'other positions': ({'model.positions': 'relative'}, 19),
  'another feed-forward': ({'model.ffn': 'swiglu'}, 20),
  'norms of queries and keys': ({'model.qk_norm': True}, 20),
  'a wider feed-forward': ({'model.ffn_dim': 32}, 17),
  'fewer keys': ({'model.kv_heads': 2}, 16),
  'unrolled': ({'model.scan': False}, 20),
  'recomputed': ({'model.remat': 'full'}, 20),
  'a head of its own': ({'objective.tied': False}, 20),
  'a deeper one': ({'model.depth': 3}, 4),
  'longer rows': ({'length': 32}, 19),
}


def begun(objective: str = 'clm', seed: int = 0, **arm) -> dict[str, np.ndarray]:
  """The parameters that a run begins with, by path."""
  c = config.base(objective=objective, tokenizer='bytes')
  c.length, c.batch = 16, 2
  c.model.update(depth=2, dim=16, heads=4)
  with c.unlocked():
    c.update_from_flattened_dict(arm)
  parts = experiment.sketch(config.resolve(c))
  batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), parts.abstract_batch())
  init = jax.jit(lambda key: parts.init_params(key, batch))
  return fingerprint.named(jax.device_get(nn.unbox(init(jax.random.key(seed)))))


@pytest.fixture(scope='module')
def reference():
  return begun()


def shared(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
  return [name for name in a if name in b and a[name].shape == b[name].shape]


@pytest.mark.parametrize('arm', ARMS)
def test_what_is_shared_begins_alike(reference, arm):
  overrides, count = ARMS[arm]
  made = begun(**overrides)
  names = shared(reference, made)
  assert len(names) == count
  for name in names:
    np.testing.assert_array_equal(reference[name], made[name], err_msg=name)


def test_so_it_does_under_another_objective(reference):
  made = begun('mlm')
  names = shared(reference, made)
  assert len(names) == 20
  assert all(np.array_equal(reference[name], made[name]) for name in names)


def test_nothing_else_begins_alike(reference):
  """Neither two arrays, nor two layers of one, nor two seeds."""
  other = begun(seed=1)
  random = {name: x for name, x in reference.items() if x.std() > 0}
  assert len(random) == 8
  drawn = {name: [*x] if 'blocks' in name else [x] for name, x in random.items()}
  drawn |= {f'{name} of seed 1': [other[name]] for name in random if 'blocks' not in name}
  drawn |= {f'{name} of seed 1': [*other[name]] for name in random if 'blocks' in name}
  flat = [(name, x.ravel()) for name, layers in drawn.items() for x in layers]
  for (one, x), (two, y) in itertools.combinations(flat, 2):
    n = min(len(x), len(y))
    assert abs(np.corrcoef(x[:n], y[:n])[0, 1]) < 0.5, f'{one} and {two}'
