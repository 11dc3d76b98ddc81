"""The arms of an ablation: what each is called, and that they differ in nothing but what was named.

An arm is an element of a sweep: overrides of one experiment file.  The first is the reference.
"""

import dataclasses
import shlex
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from lmjax import config, record
from lmjax.errors import UserError
from lmjax.sweep import BESIDE, Overrides, product


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
  """One experiment of those that are compared."""

  spec: str  # FILE.py[:ARGUMENT]
  overrides: Overrides  # what was named
  solved: Overrides = dataclasses.field(default_factory=dict)  # and what makes it comparable
  shared: Overrides = dataclasses.field(default_factory=dict)  # what all arms have been given

  @property
  def name(self) -> str:
    """Says what it is, also as the name of a directory."""
    said = ','.join(f'{key}={value}' for key, value in self.overrides.items())
    return urllib.parse.quote(said or 'reference', safe=" =,.:+-_[](){}'")

  def flags(self, seed: int | None = None) -> list[str]:
    """Those by which lmjax.main runs it."""
    own = {} if seed is None else {'seed': seed}
    return config.flags_of(self.spec, self.given | own)

  @property
  def given(self) -> Overrides:
    """All by which it differs from the file."""
    return {**self.shared, **self.overrides, **self.solved}

  def command(self) -> str:
    """What a shell is told to run it, but for seed and workdir."""
    return shlex.join(['python', '-m', 'lmjax.main', *self.flags()])

  def config(self) -> dict[str, Any]:
    """Resolved; a UserError where it is none."""
    return config.resolve(config.load(self.spec, self.given))


def of(spec: str, vary: Sequence[str], shared: Overrides | None = None) -> list[Arm]:
  """Every combination of what is varied, or else the arms of the file's own sweep.

  All have the overrides `shared` besides.

  Raises:
    UserError: there is nothing to compare, or two arms are called the same.
  """
  varied = dict(map(_values, vary))
  if len(varied) < len(vary):
    raise UserError('a key is varied twice: give all its values at once, as KEY=V1,V2')
  asked = product(varied) if varied else config.arms(spec)
  found = [Arm(spec, one, shared=shared or {}) for one in asked]
  names = [arm.name for arm in found]
  if any('seed' in arm.overrides for arm in found):
    raise UserError('seed is varied, and every arm gets the same seeds: --seeds says how many')
  if len(found) < 2:
    raise UserError(f'there is one arm only ({names[0]}): give a key two values or more')
  if twice := {name for name in names if names.count(name) > 1}:
    raise UserError(f'two arms are called {min(twice)}')
  if long := next((name for name in names if len(name.encode()) > 200), ''):
    raise UserError(f'{long[:60]}… is too long for the name of a directory: make it a variant')
  return found


def _values(said: str) -> tuple[str, list[str]]:
  """'a.b=1,2' -> ('a.b', ['1', '2']); commas inside brackets or quotes divide nothing.

  A quote stands at the beginning of a value, or in brackets: elsewhere it is an apostrophe.
  """
  key, found, rest = said.partition('=')
  key = key.strip().removeprefix('config.')
  if not (key and found and rest):
    raise UserError(f'--vary={said} is not KEY=V1,V2')
  values, depth, quote = [''], 0, ''
  for c in rest:
    opens = c in '\'"' and not quote and (depth or not values[-1].strip())
    quote = c if opens else '' if c == quote else quote
    depth += not quote and (c in '([{') - (c in ')]}')
    if c == ',' and not depth and not quote:
      values.append('')
    else:
      values[-1] += c
  return key, [value.strip() for value in values]


def named(arms: Sequence[Arm]) -> list[str]:
  """The keys that any arm names."""
  return sorted({key for arm in arms for key in arm.overrides})


def moved(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
  """Leaf -> its value in every arm, of the leaves that are not the same in all."""
  flat = [record.flatten(c) for c in configs.values()]
  keys = sorted(set().union(*flat))
  values = {key: [c.get(key) for c in flat] for key in keys}
  return {key: found for key, found in values.items() if any(x != found[0] for x in found)}


def check_moved(
  changes: Mapping[str, Sequence[Any]], arms: Sequence[Arm], may_move: Sequence[str]
) -> None:
  """Raises a UserError, with the list, where something moves that nobody has named.

  `may_move` are keys or sections, for what a variant of the experiment file changes.
  """
  solved = {key for arm in arms for key in arm.solved}
  free = {*named(arms), *solved, *may_move} - set(BESIDE)
  within = lambda key: any(key == one or key.startswith(one + '.') for one in free)
  others = {key: values for key, values in changes.items() if not within(key)}
  if others:
    listed = '; '.join(f'{key} is {", ".join(map(repr, x))}' for key, x in others.items())
    raise UserError(
      f'the arms differ in more than was named: {listed}.  If that is meant, name it: '
      f'--may_move={",".join(others)}'
    )
  # A choice by name, such as objective.name, brings its own keys.
  unmoved = [key for key in named(arms) if key not in BESIDE and not _moves(key, changes)]
  if unmoved:
    raise UserError(f'{unmoved[0]} has the same value in every arm')


def _moves(key: str, changes: Mapping[str, Any]) -> bool:
  return any(one == key or one.startswith(key + '.') for one in changes)
