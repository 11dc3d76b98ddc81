"""What is the same in all arms, found out before anything is trained: the hold-fixed proof."""

import hashlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from lmjax import evaluate, experiment, yardstick
from lmjax.ablate.arms import Arm
from lmjax.data import loader
from lmjax.errors import UserError

ROWS = 256  # of an evaluation set, that are looked at
# Sections and keys of the config by which what is found may differ.
BY_DATA = ('data', 'tokenizer')
BY_ROWS = (*BY_DATA, 'length', 'objective')
BY_SIZE = (*BY_ROWS, 'model')
OTHER = 'the objective is another, and so is what it adds up'


class Facts(NamedTuple):
  """Of an arm, with its data made."""

  parameters: int
  flops: int  # of a training step on the global batch, in matrix products
  steps: int
  tokens: int  # in the rows of a step
  batch: int
  tokenizer: str  # fingerprint
  sources: dict[str, str]  # name of a set -> fingerprint of its text
  rows: str  # what of the text is in which row, and so in which step
  sets: dict[str, str]  # name of an evaluation set -> fingerprint of its rows as a model sees them
  partial: frozenset[str]  # sets of which evaluate.batches leave some rows out
  windows: str  # fingerprint of those of the yardstick; '' without it
  causal: bool  # sees what stands before a token, and not what follows
  metrics: frozenset[str]  # what its evaluation reports

  @property
  def flops_per_token(self) -> int:
    return round(self.flops / self.tokens)

  @property
  def all_tokens(self) -> int:
    return self.steps * self.tokens


def of(arm: Arm) -> Facts:
  """Makes tokenizer and token stores, which are kept in the cache, where they are not there yet.

  Raises:
    UserError: the arm's parts or data do not fit together.
  """
  c = arm.config()
  parts = experiment.prepare(c)
  tokenizer = parts.digests['tokenizer']
  train, sets = parts.examples('train'), c['data']['eval']
  most = c['evaluate']['batches'] * c['batch'] or sys.maxsize
  stored = parts.stores['train'].digest
  return Facts(
    parameters=sum(x.size for x in jax.tree.leaves(parts.boxed_shapes)),
    flops=parts.flops.model,
    steps=c['steps'],
    tokens=c['batch'] * c['length'],
    batch=c['batch'],
    tokenizer=tokenizer,
    sources={name: source.fingerprint for name, source in parts.sources.items()},
    rows=f'{stored}-{_digest(train.spans)}-{len(train)}',
    sets={name: _rows(parts.examples(name), most) for name in sets},
    partial=frozenset(name for name in sets if len(parts.examples(name)) > most),
    windows=_digest(yardstick.rows(parts).windows) if c['evaluate'][yardstick.NAME] else '',
    causal=parts.objective.causal,
    metrics=frozenset(_reported(parts)),
  )


def _reported(parts: experiment.Experiment) -> list[str]:
  shared = parts.config['evaluate'][yardstick.NAME]
  numbers = yardstick.NUMBERS if shared else ()
  with nn.logical_axis_rules(()):
    found = evaluate.reported(parts)
  return [*found, *(f'eval/{yardstick.NAME}/{key}' for key in numbers)]


def _rows(examples: Any, most: int) -> str:
  """A fingerprint of some of the first rows, evenly spread, and of how many are evaluated."""
  among = min(len(examples), most)
  count = min(among, ROWS)
  indices = (np.arange(count) * among) // count
  made = examples(indices, np.zeros_like(indices))
  return f'{loader.fingerprint(made):016x}-{among}'


def _digest(numbers: np.ndarray) -> str:
  return hashlib.blake2b(np.ascontiguousarray(numbers, np.int64), digest_size=8).hexdigest()


def check(facts: Sequence[Facts], named: Sequence[str]) -> None:
  """Raises a UserError, with the list, where more moved than these keys can have moved."""
  causes = {
    'parameters': BY_SIZE,
    'flops_per_token': BY_SIZE,
    'all_tokens': ('steps', 'batch', 'length'),
    'tokenizer': BY_DATA,
    'sources': BY_DATA,
    'rows': BY_ROWS,
    'sets': (*BY_ROWS, 'batch', 'evaluate'),
  }
  sections, wrong = {key.split('.')[0] for key in named}, []
  for key, may in causes.items():
    values = [getattr(one, key) for one in facts]
    if any(x != values[0] for x in values) and not sections & {*may, 'variant'}:
      wrong.append(f'{key}: {", ".join(map(str, values))}')
  if wrong:
    raise UserError(f'something moved that nobody has named: {"; ".join(wrong)}')


def lines(facts: Sequence[Facts]) -> list[str]:
  """What is the same and what is not, in words."""
  said = []

  def tell(what: str, values: Sequence[Any], form: str = '{:,}') -> None:
    same = all(x == values[0] for x in values)
    listed = form.format(values[0]) if same else ', '.join(map(form.format, values))
    said.append(f'{what}: {"the same, " if same else ""}{listed}')

  tell('parameters', [one.parameters for one in facts])
  tell('FLOPs a token', [one.flops_per_token for one in facts], '{:.4g}')
  tell('steps', [one.steps for one in facts])
  tell('tokens in all', [one.all_tokens for one in facts])
  tell('FLOPs in all', [one.steps * one.flops for one in facts], '{:.4g}')
  tell('tokenizer', [one.tokenizer for one in facts], '{}')
  said.append(f'order of the text: {_order(facts)}')
  for name in facts[0].sets:
    tell(f'rows of {name}', [one.sets.get(name, 'none') for one in facts], '{}')
  return said


def _order(facts: Sequence[Facts]) -> str:
  same = lambda key: all(getattr(one, key) == getattr(facts[0], key) for one in facts)
  if not same('rows'):
    return 'each arm cuts the text into rows of its own'
  if not same('batch'):
    return 'the same rows one after the other, so many in a step as the batch has'
  return 'the same stretches of text in the same rows of the same steps, by seed'


def comparable(facts: Sequence[Facts], named: Sequence[str], reported: set[str]) -> dict[str, str]:
  """Metric -> '' where its numbers compare between the arms, or else why they do not."""
  objective, found = other_objective(named), {}
  differ = lambda values: len(set(values)) > 1
  for metric in sorted(reported):
    name, _, kind = metric.removeprefix('eval/').rpartition('/')
    why = ''
    if name == 'yardstick':
      if differ(one.tokenizer for one in facts):
        why = 'the arms have tokenizers of their own'
      elif differ(one.windows for one in facts):
        why = 'it is of other texts'
      elif kind.startswith('pseudo_') and differ(one.causal for one in facts):
        why = 'of models that see what stands before it is a likelihood, of others none'
    elif kind == 'bits_per_byte':
      if differ(one.sources.get(name) for one in facts):
        why = 'it is of other texts'
      elif differ((name in one.partial and one.sets[name]) for one in facts):
        why = 'evaluate.batches end at other places of the text'
    elif differ(one.sets.get(name) for one in facts):
      why = 'the arms are asked for other things, or of other rows'
    elif objective and kind not in SHARED:
      why = OTHER
    found[metric] = why
  return found


def training(facts: Sequence[Facts], named: Sequence[str]) -> str:
  """'' where the losses of training compare between the arms, or else why they do not."""
  if any(one.tokenizer != facts[0].tokenizer for one in facts):
    return 'the arms have tokenizers of their own'
  if any(one.rows != facts[0].rows for one in facts):
    return 'the arms read other rows'
  return OTHER if other_objective(named) else ''


def other_objective(named: Sequence[str]) -> bool:
  """Whether what is minimised, or made of a text, may be another."""
  return any(key == 'variant' or key.split('.')[0] == 'objective' for key in named)


SHARED = ('xent', 'perplexity', 'accuracy', 'mlm_accuracy')  # of equal rows, whatever is minimised
