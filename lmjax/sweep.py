"""Sweeps: lists of flat override dicts, and how to make long ones of short ones."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

Overrides = dict[str, Any]  # dotted key -> value
# Keys of an element that are none of the config: `variant` is the argument of the experiment file,
# and `label` a name that changes nothing, as of two arms that should not differ.
BESIDE = ('variant', 'label')


def product(*parts: Mapping[str, Iterable[Any]] | list[Overrides]) -> list[Overrides]:
  """Every combination; a part is {'a.b': values} or itself a sweep."""
  combinations = itertools.product(*map(_expand, parts))
  return [{k: v for overrides in c for k, v in overrides.items()} for c in combinations]


def zipped(axes: Mapping[str, Iterable[Any]]) -> list[Overrides]:
  """{'a': [1, 2], 'b': [3, 4]} -> [{'a': 1, 'b': 3}, {'a': 2, 'b': 4}]."""
  return [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]


def chain(*parts: Mapping[str, Iterable[Any]] | list[Overrides]) -> list[Overrides]:
  """One sweep after the other."""
  return [overrides for part in parts for overrides in _expand(part)]


def _expand(part: Mapping[str, Iterable[Any]] | list[Overrides]) -> list[Overrides]:
  if isinstance(part, list):
    return part
  return [dict(zip(part, values, strict=True)) for values in itertools.product(*part.values())]


def arguments(overrides: Mapping[str, Any]) -> list[str]:
  """{'objective.rate': 0.3} -> ['--config.objective.rate=0.3']."""
  return [f'--config.{key}={value}' for key, value in overrides.items() if key not in BESIDE]


def flags_of(spec: str, overrides: Mapping[str, Any]) -> list[str]:
  """An element of the experiment's sweep as the flags that load it."""
  file = spec.partition(':')[0]
  spec = f'{file}:{overrides["variant"]}' if 'variant' in overrides else spec
  return [f'--config={spec}', *arguments(overrides)]
