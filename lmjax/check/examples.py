"""Oracles of what is made of text, before any model sees it."""

import numpy as np

from lmjax.check.twin import Finding, Twin
from lmjax.data import loader

MANY = 64  # rows to look at
SHORT = 1  # targets that a row may lack: whole words that fit leave 0.7 of a place, or less


def function_of_the_step(twin: Twin) -> Finding:
  """A row depends on its index and epoch alone, and a batch on its step."""
  wrong = set()
  for examples in map(twin.examples, twin.stores):
    indices, epochs = np.array([3, 0, 1, 3]) % len(examples), np.array([0, 0, 2, 1])
    together = examples(indices, epochs)
    for row in range(len(indices)):
      alone = examples(indices[row : row + 1], epochs[row : row + 1])
      wrong |= {key for key, x in alone.items() if not np.array_equal(x[0], together[key][row])}
  examples = twin.examples('train')
  batches = loader.Loader(examples, len(indices), twin.config['seed'])
  hashes = [loader.fingerprint(batches.batch(step)) for step in (5, 0, 5)]
  wrong |= {'the batch of step 5, asked for twice'} if hashes[0] != hashes[2] else set()
  wrong |= {'the batches of steps 0 and 5, which are one'} if hashes[0] == hashes[1] else set()
  return Finding(
    not wrong,
    f'differs with what is asked beside it: {", ".join(sorted(wrong))}' if wrong else 'rows agree',
    'Examples keep a state or share a random generator: draw from (seed, index, epoch) alone '
    '(data/corrupt.py), or no run can be taken up and no two compared.',
  )


def every_token(twin: Twin) -> Finding:
  """Each token of the text is to be predicted once an epoch, and none twice."""
  if not twin.objective.scores_every_token:
    return Finding(None, 'the objective does not predict them all, as asked')
  text, examples = np.concatenate(twin.stores['train'].shards), twin.examples('train')
  indices = np.arange(len(examples))
  made = examples(indices, np.zeros_like(indices))
  count = lambda ids, weights=None: np.bincount(ids.ravel(), weights, twin.vocab_size)
  missed = count(text) - count(made['targets'], made['weights'].ravel())
  saw = f'{int(made["weights"].sum()):,} targets of {len(text):,} tokens'
  if missed.any():
    saw += f'; id {np.abs(missed).argmax()} is missing {missed[np.abs(missed).argmax()]:.0f} times'
  return Finding(
    bool(not missed.any()),
    saw,
    'Windows overlap or leave gaps, a token has no weight, or one has several: look at the '
    "objective's examples.",
  )


def next_token(twin: Twin) -> Finding:
  """The target at a place is the token that comes next in the same row."""
  if not (twin.objective.causal and twin.objective.scores_every_token):
    return Finding(None, 'the objective does not continue texts')
  made = _rows(twin)
  looked = made['weights'][:, :-1] > 0
  right = made['targets'][:, :-1] == made['tokens'][:, 1:]
  share = right[looked].mean()
  return Finding(
    bool(share == 1),
    f'{share:.1%} of the targets are the tokens that follow',
    'Targets are shifted by too much, too little or the wrong way.',
  )


def hidden(twin: Twin) -> Finding:
  """As many tokens as the objective asks for are hidden, as often as it asks, and no others."""
  if 'places' not in twin.batch:
    return Finding(None, 'the objective hides no tokens')
  made, o = _rows(twin), twin.objective
  real = made['weights'] > 0
  there, count = np.take_along_axis(made['tokens'], made['places'], axis=1)[real], real.sum()
  masked = there == twin.tokenizer.mask
  chance = 1 / max(1, (~twin.tokenizer.special).sum())  # that a random token is the right one
  shares = {  # name -> (found, asked for)
    'stand where they are to be predicted': (there == made['targets'][real], o.visible),
    'are masked': (masked, o.mask_share),
  }
  far, saw = False, []
  for name, (found, asked) in shares.items():
    limit = 4 * np.sqrt(max(asked * (1 - asked), chance) / count) + chance
    far |= bool(abs(found.mean() - asked) > limit)
    saw.append(f'{found.mean():.1%} {name}, of {asked:.1%}')
  others = (made['tokens'] == twin.tokenizer.mask).sum() - masked.sum()
  asked, chosen = _asked(twin, made), real.sum(axis=1)
  many = int((chosen > np.maximum(1, np.ceil(asked))).sum())
  few = np.floor(asked).sum() - chosen.sum() > SHORT * len(chosen)
  return Finding(
    bool(not far and not others and not many and not few),
    f'a row has {chosen.mean():.1f} targets, of {asked.mean():.1f}; {many} rows have too many; '
    f'of all {count} {", ".join(saw)}; {others} other tokens are masked',
    'Too many or too few tokens are predicted, or the mask is put where nothing is predicted, or '
    'not as often as it should be, or targets are taken from a text that is corrupted already.',
  )


def _asked(twin: Twin, made: dict[str, np.ndarray]) -> np.ndarray:
  """How many targets the objective asks for in each row, not rounded."""
  clean, o = made['tokens'].copy(), twin.objective
  row, slot = np.nonzero(made['weights'])
  clean[row, made['places'][row, slot]] = made['targets'][row, slot]
  ordinary = ~twin.tokenizer.special[clean]
  return np.minimum(o.rate * ordinary.sum(axis=1), o.predictions or np.inf)


def _rows(twin: Twin) -> dict[str, np.ndarray]:
  examples = twin.examples('train')
  indices = np.arange(min(MANY, len(examples)))
  return examples(indices, np.zeros_like(indices))
