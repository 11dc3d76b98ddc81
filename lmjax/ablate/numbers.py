"""How the numbers of a study are written."""

import math
from collections.abc import Callable
from typing import Any

NOTHING = '–'


def metric(study: dict[str, Any], sign: str = '') -> Callable[[float | None], str]:
  """Writes all values of a study with the same decimals: two digits of what is told apart."""
  intervals = [comparison['interval'] for comparison in study['comparisons']]
  sizes = sorted((high - low) / 2 for low, high in filter(None, intervals))
  sizes = [sizes[len(sizes) // 2]] if sizes else []
  sizes += [study['noise']['deviation'] or 0.0, study['margin'], 0.001]
  size = next(x for x in sizes if 0 < x < math.inf)
  decimals = min(max(1 - math.floor(math.log10(size)), 0), 6)

  def written(value: float | None) -> str:
    return NOTHING if value is None else f'{value:{sign}.{decimals}f}'.replace('-', '−')

  return written


def difference(study: dict[str, Any], comparison: dict[str, Any]) -> str:
  """With its interval."""
  signed = metric(study, '+')
  if comparison['difference'] is None:
    return NOTHING
  if comparison['interval'] is None:
    return signed(comparison['difference'])
  low, high = map(signed, comparison['interval'])
  return f'{signed(comparison["difference"])} [{low}, {high}]'


def unit(study: dict[str, Any]) -> str:
  """Behind a number."""
  return study['unit'] and f' {study["unit"]}'


def duration(seconds: float | None) -> str:
  if seconds is None:
    return NOTHING
  if seconds < 120:
    return f'{seconds:.3g} s'
  return f'{seconds / 60:.1f} min' if seconds < 7200 else f'{seconds / 3600:.1f} h'


def count(value: float | None) -> str:
  return NOTHING if value is None else f'{value:,.0f}'


def large(value: float | None) -> str:
  if value is None:
    return NOTHING
  mantissa, exponent = f'{value:.2e}'.split('e')
  return f'{mantissa}e{int(exponent)}'


def p_value(value: float | None) -> str:
  return NOTHING if value is None else f'{value:.2g}'


def many(count: int, what: str) -> str:
  return f'{count} {what}' if count == 1 else f'{count} {what}s'
