"""What is the same in all arms, found out before anything is trained: the hold-fixed proof."""

import hashlib
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
  metrics: frozenset[str]  # what its evaluation reports


def of(arm: Arm) -> Facts:
  """Makes tokenizer and token stores, which are kept in the cache, where they are not there yet.

  Raises:
    UserError: the arm's parts or data do not fit together.
  """
  c = arm.config()
  parts = experiment.prepare(c)
  tokenizer = parts.digests['tokenizer']
  train = parts.examples('train')
  spans = hashlib.blake2b(np.ascontiguousarray(train.spans, np.int64), digest_size=8)
  stored = parts.stores['train'].digest
  return Facts(
    parameters=sum(x.size for x in jax.tree.leaves(parts.boxed_shapes())),
    flops=parts.flops.model,
    steps=c['steps'],
    tokens=c['batch'] * c['length'],
    batch=c['batch'],
    tokenizer=tokenizer,
    sources={name: source.fingerprint for name, source in parts.sources.items()},
    rows=f'{stored}-{spans.hexdigest()}-{len(train)}',
    sets={name: _rows(parts.examples(name)) for name in c['data']['eval']},
    metrics=frozenset(_reported(parts)),
  )


def _reported(parts: experiment.Experiment) -> list[str]:
  shared = parts.config['evaluate'][yardstick.NAME]
  numbers = yardstick.NUMBERS if shared else ()
  with nn.logical_axis_rules(()):
    found = evaluate.reported(parts)
  return [*found, *(f'eval/{yardstick.NAME}/{key}' for key in numbers)]


def _rows(examples: Any) -> str:
  """A fingerprint of some rows, evenly spread, and of how many there are."""
  count = min(len(examples), ROWS)
  indices = (np.arange(count) * len(examples)) // count
  made = examples(indices, np.zeros_like(indices))
  return f'{loader.fingerprint(made):016x}-{len(examples)}'


def check(facts: Sequence[Facts], named: Sequence[str]) -> None:
  """Raises a UserError, with the list, where more moved than what was named can have moved."""
  causes = {
    'parameters': BY_SIZE,
    'tokenizer': BY_DATA,
    'sources': BY_DATA,
    'rows': BY_ROWS,
    'sets': BY_ROWS,
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
  tell('FLOPs a token', [round(one.flops / one.tokens) for one in facts], '{:.4g}')
  tell('steps', [one.steps for one in facts])
  tell('tokens in all', [one.steps * one.tokens for one in facts])
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
  objective = any(key == 'variant' or key.split('.')[0] == 'objective' for key in named)
  found = {}
  for metric in sorted(reported):
    name, _, kind = metric.removeprefix('eval/').rpartition('/')
    why = ''
    if name == 'yardstick':
      if any(one.tokenizer != facts[0].tokenizer for one in facts):
        why = 'the arms have tokenizers of their own'
    elif kind == 'bits_per_byte':
      if any(one.sources.get(name) != facts[0].sources.get(name) for one in facts):
        why = 'it is of other texts'
    elif any(one.sets.get(name) != facts[0].sets.get(name) for one in facts):
      why = 'the arms are asked for other things, or of other rows'
    elif objective and kind not in SHARED:
      why = 'the objective is another, and so is what it adds up'
    found[metric] = why
  return found


SHARED = ('xent', 'perplexity', 'accuracy', 'mlm_accuracy')  # of equal rows, whatever is minimised
