"""What a comparison comes to: one of six outcomes, and a sentence that claims no more than it."""

import math
from typing import NamedTuple


class Asked(NamedTuple):
  unit: str
  lower_is_better: bool
  margin: float
  alpha: float
  power: float
  count: int  # of comparisons

  @property
  def share(self) -> float:
    """Bonferroni's."""
    return self.alpha / self.count


class Tested(NamedTuple):
  n: int
  mean: float
  deviation: float  # nan where nothing is known of it
  p: float
  holm: float
  half: float  # the interval is mean ± half
  widest: float  # Bonferroni's half


def outcome(tested: Tested, asked: Asked) -> str:
  """See statistics.compare."""
  if math.isnan(tested.deviation):
    return 'unknown'
  if tested.mean == tested.deviation == 0:
    return 'same'
  if tested.holm <= asked.alpha:
    return 'better' if (tested.mean < 0) == asked.lower_is_better else 'worse'
  return 'equivalent' if _is_small(tested, asked) else 'inconclusive'


def _is_small(tested: Tested, asked: Asked) -> bool:
  """Whatever the outcome, at Bonferroni's level: such claims all hold at once."""
  return abs(tested.mean) + tested.widest <= asked.margin


def sentence(
  outcome: str, tested: Tested, asked: Asked, more: int | None, least: float | None
) -> str:
  """With `more` seeds needed, or, where there is no margin to say how many, what these find."""
  n, unit = tested.n, asked.unit and f' {asked.unit}'
  match outcome:
    case 'unknown' if n > 1:
      return (
        f'unknown: all {n} seeds differ by {tested.mean:.3g}{unit}, which is too coarse a number'
      )
    case 'unknown' if n:
      return 'unknown: one seed says nothing about noise; at least 1 more is needed'
    case 'unknown':
      return 'unknown: no seed has ended in both arms; at least 2 are needed'
    case 'same':
      return 'the same: every seed ends with the same number'
    case 'equivalent':
      return f'no difference larger than {_exact(asked.margin)}{unit}'
    case 'inconclusive' if more is None:
      return f'inconclusive: {n} seeds find only differences of {_about(least)}{unit} and more'
    case 'inconclusive':
      rounded = int(float(f'{more:.2g}')) if more >= 100 else more
      seeds = f'{rounded:,} more seed{"" if more == 1 else "s"}'
      return f'inconclusive: about {seeds} would tell {_exact(asked.margin)}{unit}'
  p = 'p < 0.001' if tested.holm < 0.001 else f'p = {tested.holm:.3f}'
  small = _is_small(tested, asked)
  but = f', but by no more than {_exact(asked.margin)}{unit}' if small else ''
  return f'{outcome} by {_size(abs(tested.mean), tested.half, unit)}, {p}{but}'


def _size(mean: float, half: float, unit: str) -> str:
  """mean ± half, to as many digits as are needed to see that one is the larger."""
  first = _decimals(half, 2 if f'{half:.1e}'[0] in '12' else 1)
  for decimals in range(first, first + 6):
    size, error = (f'{x:,.{decimals}f}' for x in (mean, half))
    if size != error:
      break
  return f'{size} ± {error}{unit}'


def _about(x: float) -> str:
  return f'{x:,.{_decimals(x, 2)}f}'


def _exact(x: float) -> str:
  """With two digits, or the six that a number may have."""
  short = _about(x)
  return short if math.isclose(float(short.replace(',', '')), x) else f'{x:,.6g}'


def _decimals(x: float, digits: int) -> int:
  """Places after the point that show so many digits."""
  return max(0, digits - 1 - int(f'{x:.1e}'.partition('e')[2]))
