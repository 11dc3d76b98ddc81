"""Oracles of who sees whom: what may move a loss, and what must.

Each looks at a batch through its weights: with those of some places only, the loss is theirs alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.check.twin import Batch, Finding, Twin, quickly

UNMOVED, MOVED = 1e-5, 1e-4  # relative changes of a loss; what is seen moves these by 1e-3 or more


def causality(twin: Twin) -> Finding:
  """Later tokens move nothing before them; or, in an objective that looks both ways, they do."""
  places = np.arange(twin.config['length'])[None]
  back, forth = [], []  # how far later tokens move what is before them, and earlier ones the rest
  for cut in np.array([1, 2, 3]) * places.size // 4:
    earlier, later = places <= cut, places > cut
    back.append(_moved(twin, kept(twin.batch, earlier), later))
    forth.append(_moved(twin, kept(twin.batch, later), earlier))
  causal, back, forth = twin.objective.causal, np.max(back), np.max(forth)
  saw = f'later tokens move the loss by {back:.1e}, earlier ones by {forth:.1e}'
  if causal and not back <= UNMOVED:
    what = 'It sees the future' if forth > MOVED else 'It sees the future, and not what is before'
    return Finding(
      False,
      saw,
      f'{what}: look at the mask that the objective hands to the core (models/attention.py, Mask), '
      'and at whatever in the core mixes places.',
    )
  if not forth > MOVED or not (causal or back > MOVED):
    return Finding(
      False,
      saw,
      'Tokens that should be seen are not: look at the mask that the objective hands to the core '
      '(models/attention.py, Mask), and whether attention is added to the residual stream.',
    )
  return Finding(True, saw)


def order(twin: Twin) -> Finding:
  """The same tokens in another order are another text."""
  if getattr(twin.core, 'positions', '') == 'none':
    return Finding(None, 'the model has no positions, as asked')
  places, moved, others = np.arange(twin.config['length'])[None], [], []
  for cut in np.array([1, 2, 3]) * places.size // 4:
    later = kept(twin.batch, places >= cut)
    turned = later['tokens'].copy()
    turned[:, 1:cut] = turned[:, 1:cut][:, ::-1]
    moved.append(change(twin.loss(later | {'tokens': turned}), twin.loss(later)))
    others.append(_moved(twin, later, places < cut))
  return Finding(
    bool(np.max(moved) > MOVED),
    f'earlier tokens turned round move the loss by {np.max(moved):.1e}, others in their place by '
    f'{np.max(others):.1e}',
    'Positions do not reach the core: models/positions.py.'
    if np.max(others) > MOVED
    else 'Earlier tokens are not seen at all, in whatever order: see `causality`.',
  )


def rows(twin: Twin) -> Finding:
  """The rows of a batch know nothing of each other, and come in any order."""
  half = len(twin.batch['tokens']) // 2
  first = np.arange(2 * half)[:, None] < half
  moved = _moved(twin, kept(twin.batch, first), ~first)
  turned = {key: value[::-1] for key, value in twin.batch.items()}
  turning = change(twin.loss(turned), twin.loss(twin.batch))
  return Finding(
    moved <= UNMOVED and turning <= UNMOVED,
    f'other rows move the loss by {moved:.1e}, another order of rows by {turning:.1e}',
    'Something is computed across the batch: a statistic, a mask or a place of another row.',
  )


def documents(twin: Twin) -> Finding:
  """Documents, or pairs, that share a row do not see each other, where that is asked for."""
  segments = twin.batch.get('segments', np.ones((1, 1), int))
  if not twin.objective.separates:
    return Finding(None, 'what shares a row sees all of it, as asked')
  if segments.max() < 2:
    saw = 'texts that share a row are to be apart, and `segments` tell none from another'
    return Finding(False, saw, "Look at the objective's examples.")
  moved = []
  for number in (1, segments.max(axis=1, keepdims=True)):
    mine = segments == number
    moved.append(_moved(twin, kept(twin.batch, mine), ~mine))
  worst = np.max(moved)
  return Finding(
    bool(worst <= UNMOVED),
    f'others in a row move the loss of a document by {worst:.1e}',
    'It sees its neighbours: look at `segments` in the batch and in the mask, and at whether the '
    'first token of a document is predicted from the last of another.',
  )


def packing(twin: Twin) -> Finding:
  """A document that shares a row has the loss that it has alone in one."""
  segments = twin.batch.get('segments', np.zeros((1, 1)))
  if segments.max() < 2:
    return Finding(None, 'rows are not packed with texts that are apart')
  mine = segments == segments.max(axis=1, keepdims=True)
  together = kept(twin.batch, mine)
  moved = change(twin.loss(_alone(together, mine)), twin.loss(together))
  return Finding(
    moved <= UNMOVED,
    f'alone in its row a document has a loss that differs by {moved:.1e}',
    'Packing changes what is trained: look at whether `positions` begin anew with each document, '
    'and whether padding is seen.',
  )


def padding(twin: Twin) -> Finding:
  """Rows that end early have the same loss in longer arrays, whatever stands behind their end."""
  length, batch = twin.config['length'], twin.batch
  if not twin.objective.causal and 'segments' not in batch:
    return Finding(None, 'rows have no padding that could be told')
  cut = 3 * length // 4
  long = kept(batch, np.arange(length)[None] < cut)
  if 'segments' in long:
    long['segments'] = np.where(np.arange(length)[None] < cut, long['segments'], 0)
  by_place = per_place(batch)
  short = {key: value[:, :cut] if key in by_place else value for key, value in long.items()}
  short |= {key: np.minimum(long[key], cut - 1) for key in long if key.endswith('places')}
  moved = change(twin.loss(short), twin.loss(long))
  return Finding(
    moved <= UNMOVED,
    f'without what stands behind the end of rows the loss differs by {moved:.1e}',
    'Padding is seen: look at `segments`, 0 at padding, and at the mask made of them.',
  )


def targets(twin: Twin) -> Finding:
  """The probabilities of all tokens at a place add up to 1, so that none knows the right one."""
  if 'xent' not in twin.totals(twin.params, twin.batch)[1]:
    return Finding(None, 'the objective predicts no tokens')
  row = int(twin.batch['weights'].any(axis=1).argmax())
  row, real = {k: v[row : row + 1] for k, v in twin.batch.items()}, twin.batch['weights'][row]
  real = np.flatnonzero(real)

  @functools.partial(jax.jit, compiler_options=quickly())
  def total(params, row, at):
    def nats(target):
      only = {'targets': row['targets'].at[0, at].set(target)}
      only['weights'] = jnp.zeros_like(row['weights']).at[0, at].set(1)
      return twin.model.apply({'params': params}, row | only, train=False)[1]['xent'].total

    return jnp.exp(-jax.lax.map(nats, jnp.arange(twin.vocab_size))).sum()

  with twin.here():
    totals = [float(total(twin.wide, row, at)) for at in real[[len(real) // 3, len(real) // 2]]]
  worst = max(totals, key=lambda total: abs(total - 1))
  return Finding(
    abs(worst - 1) < 1e-3,
    f'the probabilities of the {twin.vocab_size} tokens at a place add up to {worst:.4f}',
    'More than 1: the targets are seen, or some of them cost nothing; less: ids that no token has '
    'are likely too.  Look at what the model takes from the batch, and at models/heads.py.',
  )


def determinism(twin: Twin) -> Finding:
  """Evaluation has no noise."""
  first, again, other = (twin.totals(twin.wide, twin.batch, key) for key in (0, 0, 1))
  same = jax.tree.leaves(first) == jax.tree.leaves(again) == jax.tree.leaves(other)
  return Finding(
    same,
    f'evaluated three times, a batch has {"the same" if same else "different"} bits',
    'Dropout, or other noise, is drawn in evaluation: look at what is done with `train`.',
  )


# --------------------------------------------------------------------- batches made of a batch


def kept(batch: Batch, where: np.ndarray) -> Batch:
  """The batch with the weights of only those places, bool[B or 1, L or 1]."""
  where = np.broadcast_to(where, batch['tokens'].shape)
  made = dict(batch)
  for key in (key for key in batch if key.endswith('weights')):
    places = batch.get(key.removesuffix('weights') + 'places')
    here = where if places is None else np.take_along_axis(where, places, axis=1)
    made[key] = np.where(here, batch[key], 0).astype(batch[key].dtype)
  return made


def scrambled(twin: Twin, batch: Batch, where: np.ndarray) -> Batch:
  """The batch with other tokens, none of them special, in those places."""
  ordinary = np.flatnonzero(~twin.tokenizer.special)
  others = np.random.default_rng(0).choice(ordinary, batch['tokens'].shape)
  return batch | {'tokens': np.where(where, others, batch['tokens']).astype(np.int32)}


def per_place(batch: Batch) -> set[str]:
  """The keys of arrays that hold something for each place of a row."""
  chosen = {key.removesuffix('places') for key in batch if key.endswith('places')}
  names = {start + end for start in chosen for end in ('places', 'targets', 'weights')}
  return batch.keys() - names


def change(value: float, before: float) -> float:
  """Relative; not a number where one of them is none."""
  return abs(value - before) / max(abs(before), 1e-6)


def _moved(twin: Twin, batch: Batch, where: np.ndarray) -> float:
  return change(twin.loss(scrambled(twin, batch, where)), twin.loss(batch))


def _alone(batch: Batch, mine: np.ndarray) -> Batch:
  """Rows in which what is `mine` stands first, and nothing else is marked as real."""
  starts, counts = mine.argmax(axis=1), mine.sum(axis=1)
  length, by_place = mine.shape[1], per_place(batch)
  places = np.arange(length)[None]
  made = {}
  for key, value in batch.items():
    if key.endswith('places'):
      made[key] = np.maximum(value - starts[:, None], 0)
    elif key in by_place:
      made[key] = np.take_along_axis(value, (places + starts[:, None]) % length, axis=1)
    else:
      made[key] = value
  made['segments'] = (places < counts[:, None]).astype(np.int32)
  made['positions'] = np.broadcast_to(places, mine.shape).astype(np.int32)
  return made
