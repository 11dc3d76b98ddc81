"""Whether arms differ by more than seeds do.

Seed s gives the same batches and masks to all arms.  So an arm is compared with the reference seed
by seed, and what a seed does to both of them cancels.  A difference is always arm - reference.

Tests are two-sided paired t tests.  Holm's correction is over all arms that are asked about, also
those that are not there yet, so that alpha bounds the probability of calling any difference where
there is none.

Intervals are Bonferroni's, of level 1 - alpha/m for m comparisons, which all hold at once with
probability 1 - alpha.  Where p is above alpha/m and yet below its step of Holm, alpha/(m - k), such
an interval would contradict the outcome: there it is that of the step.  So an interval excludes 0
where a difference is called, and only there, and has a level of 1 - alpha at least; the price is
that all hold at once a little less often.

To add seeds where it was inconclusive is to look again, and each look has its alpha: with two looks
10 % instead of 5.  Who knows of n looks gives alpha / n.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from lmjax.ablate import verdicts
from lmjax.ablate.verdicts import Asked, Tested
from lmjax.errors import UserError

Values = Mapping[str, Mapping[int, float]]  # arm -> seed -> the number that the run ended with


@dataclasses.dataclass(frozen=True)
class Comparison:
  """An arm beside the reference; all of it JSON values, None where there is nothing to say."""

  arms: list[str]  # reference, arm
  metric: str
  seeds: list[int]  # that both have
  difference: float | None
  interval: list[float] | None
  p_value: float | None  # of this comparison alone
  p_holm: float | None  # of this one among all; what the outcome is decided by
  outcome: str  # better, worse, equivalent, inconclusive, same, unknown
  verdict: str
  seeds_needed: int | None  # so many more; None: no margin to say for what, or too coarse
  pairing_gain: float | None  # variance of unpaired differences / that of paired ones


class _Pairs(NamedTuple):
  seeds: list[int]
  reference: np.ndarray  # [seeds]
  arm: np.ndarray

  @property
  def differences(self) -> np.ndarray:
    return self.arm - self.reference


def compare(
  values: Values,
  metric: str,
  unit: str,
  lower_is_better: bool,
  margin: float,
  alpha: float = 0.05,
  power: float = 0.8,
) -> list[Comparison]:
  """Each arm beside the first one, over the seeds that both have.

  Outcomes:
    better, worse: a difference is called.  One that is surely inside ±margin as well is called all
      the same, since its sign is known, and the verdict says that it is small.
    equivalent: none is called, and all of the interval is inside ±margin.  With a probability of
      alpha/2 at most, any arm is wrongly said to be so near.
    inconclusive: neither.  `seeds_needed` is for a true difference as large as the margin, and
      does not look at the difference that was seen, which is mostly noise where this is asked.
    same: every difference is exactly 0.
    unknown: fewer than two pairs, or all of them differ by the same, as coarse numbers do (shares
      of few answers): such say nothing about noise.

  Args:
    values: finite numbers; the first arm is the reference.
    margin: in the metric's unit; differences up to it are of no interest.  With 0 nothing is
      equivalent.
    power: the probability with which a difference as large as the margin is to be found.
  """
  if not (0 < alpha < power < 1 and 0 <= margin < math.inf):
    raise UserError(
      f'alpha = {alpha} must be between 0 and power = {power}, which is below 1, and margin = '
      f'{margin} no less than 0'
    )
  _check_finite(values, metric)
  reference, *arms = values
  if not arms:
    return []
  asked, pairs = Asked(unit, lower_is_better, margin, alpha, power, len(arms)), _all_pairs(values)
  rows = zip(arms, pairs, _tests(pairs, asked), strict=True)
  return [_compared([reference, arm], metric, pair, tested, asked) for arm, pair, tested in rows]


def _compared(
  arms: list[str], metric: str, pairs: _Pairs, tested: Tested, asked: Asked
) -> Comparison:
  outcome = verdicts.outcome(tested, asked)
  more, known, least = _more(outcome, tested, asked), outcome != 'unknown', None
  if outcome == 'inconclusive' and more is None:
    least = detectable(tested.n, tested.deviation, asked.share, asked.power)
  return Comparison(
    arms=arms,
    metric=metric,
    seeds=pairs.seeds,
    difference=tested.mean if pairs.seeds else None,
    interval=[tested.mean - tested.half, tested.mean + tested.half] if known else None,
    p_value=tested.p if known else None,
    p_holm=tested.holm if known else None,
    outcome=outcome,
    verdict=verdicts.sentence(outcome, tested, asked, more, least),
    seeds_needed=more,
    pairing_gain=_gain([pairs] if _is_noisy(pairs) else []),
  )


def detectable(n: int, deviation: float, alpha: float, power: float) -> float:
  """The smallest true difference that a two-sided test of n pairs finds with this probability.

  `deviation` is that of paired differences, and known.  To find it is to call it by its sign.
  """
  assert n >= 2
  assert alpha < power
  shift = special.nctdtrinc(n - 1.0, 1 - power, _critical(n, alpha))
  return float(shift * deviation / math.sqrt(n))


def noise(values: Values, alpha: float, power: float) -> dict[str, float | None]:
  """What seeds do, pooled over arms; None where there are too few to know.

  deviation: over the seeds within an arm.
  detectable: the true difference that a comparison finds with this power, after the correction, at
    the fewest seeds that one has, if deviations are what they seem.
  pairing_gain: as of a Comparison.
  """
  arms = [np.array(list(arm.values())) for arm in values.values() if len(arm) > 1]
  pairs, least = list(filter(_is_noisy, _all_pairs(values))), None
  if pairs:
    deviation = math.sqrt(_pooled([pair.differences for pair in pairs]))
    seeds = min(len(pair.seeds) for pair in pairs)
    least = detectable(seeds, deviation, alpha / (len(values) - 1), power)
  return {
    'deviation': math.sqrt(_pooled(arms)) if arms else None,
    'detectable': least,
    'pairing_gain': _gain(pairs),
  }


# ------------------------------------------------------------------------------------------ tests


def _check_finite(values: Values, metric: str) -> None:
  for arm, runs in values.items():
    for seed, value in runs.items():
      if not math.isfinite(value):
        raise UserError(f'{metric} of "{arm}" is {value} with seed {seed}: it cannot be compared')


def _all_pairs(values: Values) -> list[_Pairs]:
  reference, *others = values.values()
  pairs = []
  for arm in others:
    seeds = sorted(reference.keys() & arm.keys())
    both = [np.array([runs[seed] for seed in seeds], float) for runs in (reference, arm)]
    pairs.append(_Pairs(seeds, *both))
  return pairs


def _tests(pairs: list[_Pairs], asked: Asked) -> list[Tested]:
  """A test that knows no noise has p = 1, and is among those that are corrected for."""
  n = np.array([len(pair.seeds) for pair in pairs])
  means = np.array([pair.differences.mean() if pair.seeds else math.nan for pair in pairs])
  spreads = np.array([_deviation(pair) for pair in pairs])
  errors = spreads / np.sqrt(np.maximum(n, 1))
  with np.errstate(divide='ignore', invalid='ignore'):
    p = 2 * special.stdtr(n - 1, -np.abs(means) / errors)
  p = np.where(np.isnan(p), 1.0, p)
  holm, steps = _holm(p)
  gained = (holm <= asked.alpha) & (p > asked.share)
  half = errors * _critical(n, np.where(gained, asked.alpha / steps, asked.share))
  columns = (n, means, spreads, p, holm, half, errors * _critical(n, asked.share))
  return [Tested(*row) for row in zip(*(x.tolist() for x in columns), strict=True)]


def _holm(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Corrected p, and how many hypotheses are left at the step of each."""
  order = np.argsort(p, kind='stable')
  steps, holm = np.empty(len(p)), np.empty(len(p))
  steps[order] = np.arange(len(p), 0, -1)
  holm[order] = np.minimum(1, np.maximum.accumulate((p * steps)[order]))
  return holm, steps


def _critical(n: Any, alpha: Any) -> Any:
  """Of so many pairs, the t that noise exceeds with this probability, either way."""
  return -special.stdtrit(n - 1.0, alpha / 2)


def _first(fits: Callable[[int], Any], least: int) -> int:
  """The smallest number from `least` on that fits, where all that follow it do too."""
  low, high = least - 1, least
  while not fits(high):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(middle) else (middle, high)
  return high


def _deviation(pair: _Pairs) -> float:
  """nan where nothing is known of it."""
  if _is_noisy(pair):
    return float(np.std(pair.differences, ddof=1))
  same = len(pair.seeds) > 1 and not pair.differences.any()
  return 0.0 if same else math.nan


def _is_noisy(pair: _Pairs) -> bool:
  """Differences that differ by no more than rounding say nothing about noise."""
  if len(pair.seeds) < 2:
    return False
  return bool(np.ptp(pair.differences) > 1e-12 * np.abs([pair.arm, pair.reference]).max())


def _pooled(samples: list[np.ndarray]) -> float:
  """The variance within samples."""
  squares = sum(len(x) * np.var(x) for x in samples)
  return float(squares / sum(len(x) - 1 for x in samples))


def _gain(pairs: list[_Pairs]) -> float | None:
  if not pairs:
    return None
  squares = lambda x: len(x.seeds) * np.var([x.arm, x.reference, x.differences], axis=1)
  arm, reference, both = sum(map(squares, pairs))
  return float((arm + reference) / both)


def _more(outcome: str, tested: Tested, asked: Asked) -> int | None:
  """How many more seeds a comparison needs.

  The deviation is known from n seeds only.  A plan that took it at its word would find less than
  it promises: among few seeds it is often far too small.  Where s is the deviation seen and c s /
  sqrt(k) the margin, k seeds find a difference as large with the probability that a noncentral t
  of n - 1 degrees of freedom, around the critical value, is below c (Julious and Owen, 2006).

  Where that many have been seen already, the difference may be between 0 and the margin.  Then it
  takes an interval that is no longer than the margin: it cannot both hold 0 and leave ±margin.
  """
  n, deviation, margin = tested.n, tested.deviation, asked.margin
  if outcome == 'unknown':
    return 2 - n if n < 2 else None
  if outcome != 'inconclusive':
    return 0
  if not margin:
    return None
  limit = lambda k: margin * math.sqrt(k) / deviation
  found = lambda k: special.nctdtrit(n - 1, _critical(k, asked.share), asked.power) <= limit(k)
  decided = lambda k: 2 * _critical(k, asked.share) <= limit(k)
  return _first(decided if found(n) else found, least=n + 1) - n
