"""A hundred steps of AdamW beside torch: the same weights, the same batches, the same losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import experiment, guard, huggingface, sharding, step
from lmjax.state import TrainState
from tests.parity import models_test as models

torch = pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")

STEPS, ROWS, LENGTH, WARMUP, LIMIT = 100, 4, 24, 10, 1e-4
SIZE = (2, 40, 5, 56, 101, 32, 5)
OPTIMIZER = {'lr': 2e-3, 'warmup_steps': WARMUP, 'weight_decay': 0.1, 'clip': 1.0, 'b2': 0.95}


def batches(kind: str):
  """Rows of words that follow one another in a few ways, so that there is something to learn."""
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    tokens = (rng.integers(0, 60, (ROWS, 1)) + np.arange(LENGTH + 1) * rng.integers(1, 4)) % 90 + 3
    if kind == 'gpt2':
      yield {
        'tokens': tokens[:, :-1],
        'targets': tokens[:, 1:],
        'weights': (rng.random((ROWS, LENGTH)) < 0.9).astype(np.float32),
      }
      continue
    tokens = tokens[:, :LENGTH]
    places = np.sort(rng.permuted(np.tile(np.arange(1, LENGTH), (ROWS, 1)), axis=1)[:, :6], axis=1)
    targets = np.take_along_axis(tokens, places, axis=1)
    corrupted = tokens.copy()
    np.put_along_axis(corrupted, places, 4, axis=1)
    yield {
      'tokens': corrupted,
      'segments': np.ones_like(tokens),
      'types': np.ones_like(tokens) * (np.arange(LENGTH) > 9),
      'places': places,
      'targets': targets,
      'weights': (np.arange(6) < rng.integers(2, 7, (ROWS, 1))).astype(np.float32),
      'pair_places': np.zeros((ROWS, 1), np.int64),
      'pair_targets': tokens[:, :1] % 2,
      'pair_weights': np.ones((ROWS, 1), np.float32),
    }


def of_torch(kind: str, theirs, schedule) -> list[float]:
  """The losses; what we call matrices are all that have two dimensions in torch."""
  groups = [
    {'params': [p for p in theirs.parameters() if (p.ndim > 1) == decays], 'weight_decay': rate}
    for decays, rate in ((True, OPTIMIZER['weight_decay']), (False, 0.0))
  ]
  optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, OPTIMIZER['b2']), eps=1e-8)
  losses = []
  for i, batch in enumerate(batches(kind)):
    for group in optimizer.param_groups:
      group['lr'] = float(schedule(i))
    tensors = {name: torch.tensor(x) for name, x in batch.items()}
    labels = torch.where(tensors['weights'] > 0, tensors['targets'], -100)
    cross_entropy = torch.nn.functional.cross_entropy
    if kind == 'gpt2':
      logits = theirs(tensors['tokens']).logits
      loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
    else:
      everywhere = torch.full_like(tensors['tokens'], -100).scatter(1, tensors['places'], labels)
      loss = theirs(
        tensors['tokens'],
        token_type_ids=tensors['types'],
        labels=everywhere,
        next_sentence_label=tensors['pair_targets'][:, 0],
      ).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), OPTIMIZER['clip'])
    optimizer.step()
    losses.append(loss.item())
  return losses


def of_ours(kind: str, path) -> tuple[list[float], object]:
  """(losses of the very step that trains, the schedule)."""
  dropout = {'model.dropout': 0.0, 'model.attention_dropout': 0.0}
  own = {f'optimizer.{key}': x for key, x in OPTIMIZER.items()} | dropout
  own |= {'steps': STEPS, 'batch': ROWS, 'length': LENGTH}
  source = huggingface._open(path)
  parts = experiment.sketch(
    huggingface._resolved(source, 'published', {'vocab_size': source.vocab_size}, own)
  )
  params = huggingface._params(source, parts)
  transform = parts.optimizer.transform(sharding.axis_names(parts.boxed_shapes), STEPS)
  losses = jnp.zeros(guard.WINDOW)
  state = TrainState(jnp.int32(0), params, transform.init(params), jax.random.key(0), losses)
  update = jax.jit(step.make_step(parts, transform))
  seen = []
  for batch in batches(kind):
    state, numbers = update(state, jax.tree.map(jnp.asarray, batch))
    seen.append(sum(float(term.total) / float(term.weight) for term in numbers['terms'].values()))
  return seen, parts.optimizer.schedule_fn(STEPS)


@pytest.mark.parametrize('kind', ['gpt2', 'bert'])
def test_losses_of_a_hundred_steps(kind, tmp_path):
  theirs = models.widened(models.make(kind, SIZE))
  theirs.save_pretrained(tmp_path)
  ours, schedule = of_ours(kind, tmp_path)
  expected = of_torch(kind, theirs, schedule)
  assert ours[-1] < ours[0] - 0.5, 'nothing was learned, and so nothing compared'
  np.testing.assert_allclose(ours, expected, rtol=LIMIT)
