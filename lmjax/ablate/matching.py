"""Arms that get equally much: as many steps, tokens, FLOPs, or seconds as the reference."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmjax.ablate.arms import Arm
from lmjax.errors import UserError

KINDS = {  # what is matched -> what a step of it costs
  'steps': '',
  'tokens': 'tokens',
  'flops': 'FLOPs',
  'time': 'seconds',
}
# Numbers of steps, which keep their share of the run.
SCALED = ('optimizer.warmup_steps', 'evaluate.every', 'checkpoint.every', 'log.every')


def solve(
  arms: Sequence[Arm], cost: Callable[[Arm], float], kind: str
) -> tuple[list[Arm], list[str]]:
  """The arms with as many steps as the reference's budget pays for, and what remains, in words.

  `cost` of a step of an arm, in what is matched.

  Raises:
    UserError: an arm gets less than one step, or its steps are what is varied.
  """
  if kind == 'steps':
    return list(arms), ['' for _ in arms]
  if any('steps' in arm.overrides for arm in arms):
    raise UserError(f'steps are varied, and --match={kind} would solve for them: take one of both')
  first = arms[0].config()
  budget, found, said = first['steps'] * cost(arms[0]), [], []
  for arm in arms:
    config, each = arm.config(), cost(arm)
    steps = round(budget / each)
    if steps < 1:
      raise UserError(f'a step of {arm.name} costs more {KINDS[kind]} than all of the reference')
    over = steps * each / budget - 1
    solved = _scaled(arm, config, steps)
    found.append(dataclasses.replace(arm, solved=solved))
    said.append(f'{abs(over):.2%} {"more" if over > 0 else "fewer"} {KINDS[kind]}' if over else '')
  return found, said


def _scaled(arm: Arm, config: Mapping[str, Any], steps: int) -> dict[str, int]:
  """`steps`, and what is a number of steps and was not named."""
  if steps == config['steps']:
    return {}
  solved = {'steps': steps}
  for key in SCALED:
    section, name = key.split('.')
    before = config[section][name]
    if key not in arm.overrides and before:
      solved[key] = max(1, round(before * steps / config['steps']))
  evaluate = config['evaluate']['every']
  times, rest = divmod(config['checkpoint']['every'], evaluate)
  if 'checkpoint.every' in solved and not rest:  # every checkpoint is evaluated, as it was
    solved['checkpoint.every'] = times * solved.get('evaluate.every', evaluate)
  return solved
