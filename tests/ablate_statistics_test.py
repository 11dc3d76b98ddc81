"""Noise is called a difference as rarely, and a difference is found as often, as statistics say.

Thousands of ablations whose truth is known, and worked examples of others.
"""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
from scipy import special

from lmjax.ablate import statistics
from lmjax.errors import UserError

MANY, FEW = 2000, 1000  # ablations
SPREAD = 0.01  # deviation over the seeds of an arm
PAIRED = SPREAD * math.sqrt(0.4)  # .. and of paired differences, at a correlation of 0.8
DIFFERENT, SMALL = ('better', 'worse'), ('no difference larger', 'by no more than')


def drawn(effects, seeds, heavy=False, key=0, many=FEW):
  """[many, arms, seeds], of which all arms of an ablation share a part for each seed."""
  draw = np.random.default_rng(key)
  shape = (many, len(effects), seeds)
  noise = lambda *shape: (
    draw.standard_t(3, shape) / math.sqrt(3) if heavy else draw.standard_normal(shape)
  )
  shared, own = noise(many, 1, seeds), noise(*shape)
  mixed = math.sqrt(0.8) * shared + math.sqrt(0.2) * own
  return 4 + SPREAD * mixed + np.array(effects)[:, None]


def values(runs):
  return {f'arm {n}': dict(enumerate(row)) for n, row in enumerate(np.asarray(runs).tolist())}


def compared(runs, margin=0.0, lower_is_better=True, unit='nats', **more):
  return statistics.compare(values(runs), 'loss', unit, lower_is_better, margin, **more)


@functools.cache
def ablations(effects, seeds, heavy=False, margin=0.0, many=FEW):
  """[many][arms - 1] comparisons."""
  return [compared(runs, margin) for runs in drawn(effects, seeds, heavy, many=many)]


def share(truths):
  return float(np.mean(list(truths)))


def error(p, many=FEW):
  return math.sqrt(p * (1 - p) / many)


def fewest(effect, deviation, alpha, power):
  """Pairs that find a true difference as large."""
  finds = lambda n: statistics.detectable(n, deviation, alpha, power) <= abs(effect)
  return statistics._first(finds, least=2)


def with_p(wanted, seeds=6):
  """Values whose comparisons have these p."""
  noise = np.random.default_rng(0).standard_normal((len(wanted), seeds))
  noise = (noise - noise.mean(1, keepdims=True)) / noise.std(1, ddof=1, keepdims=True)
  means = -special.stdtrit(seeds - 1, np.array(wanted) / 2) / math.sqrt(seeds)
  return np.concatenate([np.zeros((1, seeds)), noise + means[:, None]])


# -------------------------------------------------------------------------------------- no effect


@pytest.mark.parametrize(
  ('seeds', 'arms', 'heavy', 'least'),
  [  # A shared reference and heavy tails make it shy, and one that is too shy hides differences.
    *((3, 1, False, 0.04), (5, 1, False, 0.04), (3, 3, False, 0.025), (5, 3, False, 0.025)),
    *((3, 1, True, 0.02), (5, 3, True, 0.01)),
  ],
)
def test_noise_is_rarely_called_a_difference(seeds, arms, heavy, least):
  many = FEW if heavy else MANY
  found = ablations((0.0,) * (1 + arms), seeds, heavy, many=many)
  rate = share(any(c.outcome in DIFFERENT for c in one) for one in found)
  assert least <= rate <= 0.05 + 2 * error(0.05, many)


def test_arms_that_have_not_run_are_corrected_for():
  runs = with_p([0.02, 0.5])
  some = values(runs) | {'arm 3': {0: 4.0}, 'arm 4': {}}
  alone, *_ = compared(runs)
  among, *_ = statistics.compare(some, 'loss', 'nats', True, 0.0)
  assert alone.p_holm == pytest.approx(0.04)
  assert among.p_holm == pytest.approx(0.08)


def test_each_look_has_its_alpha():
  """Noise gets a second chance from seeds that are added."""
  many = 600
  runs = drawn((0.0, 0.0), 300, key=1, many=many)
  rate = lambda alpha: share(followed(one, PAIRED, alpha=alpha)[0] in DIFFERENT for one in runs)
  assert 0.05 + 2 * error(0.05, many) < rate(0.05) <= 0.1 + 2 * error(0.1, many)
  assert rate(0.025) <= 0.05 + 2 * error(0.05, many)


# ----------------------------------------------------------------------------------------- effects


@pytest.mark.parametrize(('ratio', 'arms'), [(1.5, 1), (0.6, 1), (1.0, 3)])
def test_a_planted_effect_is_found_as_often_as_was_promised(ratio, arms):
  effect = ratio * PAIRED
  seeds = fewest(effect, PAIRED, 0.05 / arms, 0.8)
  effects = (0.0, effect) + (0.0,) * (arms - 1)
  rate = lambda seeds: share(one[0].outcome == 'worse' for one in ablations(effects, seeds))
  right, fewer = rate(seeds), rate(math.floor(2 * seeds / 3))
  # Holm finds more than Bonferroni, and whole seeds more than parts of them.
  assert 0.8 - 2 * error(0.8) <= right <= 0.9
  assert fewer <= 0.8 - 4 * error(0.8)


def followed(runs, margin, part=1.0, alpha=0.05):
  """The outcome, and the seeds, of a pilot with 4 seeds and what it asks for."""
  pilot = compared(runs[:, :4], margin, alpha=alpha)[0]
  if pilot.outcome != 'inconclusive':
    return pilot.outcome, 4
  more = pilot.seeds_needed
  assert f'about {more} more seed' in pilot.verdict or more >= 100
  seeds = min(math.floor(part * (4 + more)), runs.shape[1])
  return compared(runs[:, :seeds], margin, alpha=alpha)[0].outcome, seeds


@pytest.mark.parametrize(('ratio', 'arms'), [(1.0, 1), (0.7, 3)])
def test_what_a_pilot_asks_for_is_enough(ratio, arms):
  margin = ratio * PAIRED
  many = 500
  runs = drawn((0.0, -margin) + (0.0,) * (arms - 1), 300, key=2, many=many)
  outcomes, seeds = zip(*(followed(one, margin) for one in runs), strict=True)
  found = share(x == 'better' for x in outcomes)
  assert found >= 0.8 - 2 * error(0.8, many)
  # It does not ask for the moon, although it knows the noise from 4 seeds only.
  assert np.median(seeds) <= 2.5 * fewest(margin, PAIRED, 0.05 / arms, 0.8)
  fewer = share(followed(one, margin, 2 / 3)[0] == 'better' for one in runs)
  assert fewer <= found - 2 * error(0.8, many)


def test_seeds_that_are_needed_decide():
  """Where seeds for the margin are there, it takes an interval no longer than the margin."""
  noise = np.array([1.0, -1.0] * 15) / 2
  runs = np.array([0 * noise, noise + 0.13])
  first, *_ = compared(runs, margin=0.3)
  assert (first.outcome, first.seeds_needed > 0) == ('inconclusive', True)
  seeds = 30 + first.seeds_needed
  half = lambda n: -special.stdtrit(n - 1, 0.025) * np.std(noise, ddof=1) / math.sqrt(n)
  assert half(seeds) <= 0.15 < half(seeds - 1)


@pytest.mark.parametrize('margin', [1.5, 0.3])
def test_three_arms_need_what_one_needs_with_a_third_of_alpha(margin):
  runs = with_p([0.5, 0.6, 0.7])
  several, alone = compared(runs, margin)[0], compared(runs[:2], margin, alpha=0.05 / 3)[0]
  assert several.seeds_needed == alone.seeds_needed > 0
  assert several.seeds_needed > compared(runs[:2], margin)[0].seeds_needed


@pytest.mark.parametrize('seeds', [3, 5])
def test_intervals_cover(seeds):
  truth = -1.5 * PAIRED
  found = [one for (one,) in ablations((0.0, truth), seeds)]
  covered = share(one.interval[0] <= truth <= one.interval[1] for one in found)
  assert abs(covered - 0.95) <= 2 * error(0.05)


@pytest.mark.parametrize(('ratios', 'at_once'), [((0, 1.5, -6), 0.92), ((-3, 2, 2.2), 0.95)])
def test_intervals_of_several_arms_cover(ratios, at_once):
  """Each at 1 - alpha at least, and at Bonferroni's level at most."""
  truths = PAIRED * np.array(ratios)
  found = ablations((0.0, *truths.tolist()), 5)
  ends = np.array([[c.interval for c in one] for one in found])
  covered = (ends[..., 0] <= truths) & (truths <= ends[..., 1])
  each = covered.mean(0)
  assert (each >= 0.95 - 2 * error(0.05)).all()
  assert (each <= 1 - 0.05 / 3 + 3 * error(0.05 / 3)).all()
  assert covered.all(1).mean() >= at_once - 2 * error(1 - at_once)


@pytest.mark.parametrize('arms', [1, 3])
def test_a_difference_of_the_margin_is_not_called_none(arms):
  seeds = 10
  margin = 4.5 * PAIRED / math.sqrt(seeds)  # where it is most often mistaken
  signs = (1, -1, 1)[:arms]
  found = ablations((0.0, *(sign * margin for sign in signs)), seeds, margin=margin)
  wrong = share(any(said in c.verdict for c in one for said in SMALL) for one in found)
  assert wrong <= 0.025 + 2 * error(0.025)
  none = ablations((0.0,) * (1 + arms), 2 * seeds, margin=margin, many=200)
  assert share(c.outcome == 'equivalent' for one in none for c in one) >= 0.8


# -------------------------------------------------------------------------------- worked examples


def test_paired_t_of_student():
  """Hours of sleep gained by ten patients with two drugs: Student, 1908; numbers as in R's."""
  first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
  second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
  (found,) = compared([first, second], lower_is_better=False, unit='hours')
  assert found.difference == pytest.approx(1.58)
  assert found.p_value == pytest.approx(0.002833, abs=5e-7)
  assert found.interval == pytest.approx([0.7001142, 2.4598858], abs=5e-8)
  assert found.verdict == 'better by 1.6 ± 0.9 hours, p = 0.003'
  assert found.pairing_gain == pytest.approx((3.200556 + 4.009) / 1.512889, rel=1e-5)


@pytest.mark.parametrize(
  ('p', 'holm'),
  [
    ((0.01, 0.04, 0.03, 0.005), (0.03, 0.06, 0.06, 0.02)),  # as in textbooks
    ((0.04, 0.02, 0.01), (0.04, 0.04, 0.03)),  # two that Bonferroni does not call
    ((0.6, 0.001, 0.6), (1.0, 0.003, 1.0)),
    ((0.03,), (0.03,)),
  ],
)
def test_holm(p, holm):
  found = compared(with_p(p))
  assert [c.p_value for c in found] == pytest.approx(p)
  assert [c.p_holm for c in found] == pytest.approx(holm)
  assert [c.outcome for c in found] == ['worse' if x <= 0.05 else 'inconclusive' for x in holm]


def test_what_only_holm_calls_is_called_small_by_bonferroni():
  called = lambda margin: compared(with_p([0.04, 0.001]), margin)[0]
  inner = called(0.0).interval[1]
  wide = compared(with_p([0.04]), alpha=0.025)[0].interval[1]
  assert inner < wide
  assert called(0.99 * wide).verdict == called(0.0).verdict
  assert 'by no more than' in called(1.01 * wide).verdict


@pytest.mark.parametrize(
  ('effect', 'alpha', 'power', 'seeds'),
  [  # as in G*Power
    *((0.2, 0.05, 0.8, 199), (0.4, 0.05, 0.8, 52), (0.5, 0.05, 0.8, 34), (0.8, 0.05, 0.8, 15)),
    *((0.5, 0.05, 0.95, 54), (-0.5, 0.05, 0.8, 34)),
    *((1e3, 0.05, 0.8, 2), (0.001, 0.05, 0.8, 7848882)),
  ],
)
def test_seeds_needed(effect, alpha, power, seeds):
  assert fewest(effect, 1.0, alpha, power) == seeds
  assert statistics.detectable(seeds, 1.0, alpha, power) <= abs(effect)
  if seeds > 2:
    assert statistics.detectable(seeds - 1, 1.0, alpha, power) > abs(effect)


def test_without_noise_two_seeds_are_enough():
  assert fewest(1e-9, 0.0, 0.05, 0.8) == 2


def test_noise():
  runs = {
    'a': {0: 1.0, 1: 2.0, 2: 3.0},
    'b': {0: 2.5, 1: 3.0, 2: 4.5},
    'c': {0: 1.0, 1: 2.0, 2: 3.0},  # the same: no second sample of the noise between arms
    'd': {0: 7.0},
  }
  found = statistics.noise(runs, 0.06, 0.8)
  within = [1.0, np.var([2.5, 3.0, 4.5], ddof=1)]
  between = np.var([1.5, 1.0, 1.5], ddof=1)
  assert found['deviation'] == pytest.approx(math.sqrt((1.0 + within[1] + 1.0) / 3))
  assert found['pairing_gain'] == pytest.approx(sum(within) / between)
  assert found['detectable'] == pytest.approx(
    statistics.detectable(3, math.sqrt(between), 0.02, 0.8)
  )
  nothing = dict.fromkeys(('deviation', 'detectable', 'pairing_gain'))
  assert statistics.noise({'a': {0: 1.0}, 'b': {}}, 0.05, 0.8) == nothing
  alone = statistics.noise({'a': {0: 1.0, 1: 2.0}}, 0.05, 0.8)
  assert alone == nothing | {'deviation': math.sqrt(0.5)}


def test_rounding_is_no_noise():
  reference = np.array([0.1, 2.2, 4.4])
  runs = np.array([reference, reference + 0.01])
  assert np.ptp(runs[1] - runs[0]) > 0
  found = statistics.noise(values(runs), 0.05, 0.8)
  assert found['detectable'] is found['pairing_gain'] is compared(runs)[0].pairing_gain is None
  assert found['deviation'] == pytest.approx(np.std(reference, ddof=1))


# ------------------------------------------------------------------------------------------ words

PAIRS = np.array([1.0, -1.0, 0.0]) * 0.001  # deviation 0.001, so that an interval is ± 0.0025


MORE = 'inconclusive: about'


@pytest.mark.parametrize(
  ('differences', 'margin', 'outcome', 'verdict', 'more'),
  [
    (PAIRS - 0.012, 0.01, 'better', 'better by 0.0120 ± 0.0025 nats, p = 0.002', 0),
    (PAIRS + 0.012, 0.0, 'worse', 'worse by 0.0120 ± 0.0025 nats, p = 0.002', 0),
    (PAIRS * 1.6 - 0.012, 0.01, 'better', 'better by 0.012 ± 0.004 nats, p = 0.006', 0),
    (PAIRS - 2, 0.01, 'better', 'better by 2.0000 ± 0.0025 nats, p < 0.001', 0),
    (1e6 * PAIRS - 2e4, 0.01, 'better', 'better by 20,000 ± 2,484 nats, p < 0.001', 0),
    (PAIRS + 0.00249, 0.0, 'worse', 'worse by 0.00249 ± 0.00248 nats, p = 0.050', 0),
    (
      *(PAIRS - 0.004, 0.01, 'better'),
      'better by 0.0040 ± 0.0025 nats, p = 0.020, but by no more than 0.010 nats',
      0,
    ),
    (PAIRS - 0.001, 0.01, 'equivalent', 'no difference larger than 0.010 nats', 0),
    (PAIRS - 0.001, 0.0125, 'equivalent', 'no difference larger than 0.0125 nats', 0),
    (PAIRS - 0.001, 2.0, 'equivalent', 'no difference larger than 2.0 nats', 0),
    (PAIRS * 0, 0.01, 'same', 'the same: every seed ends with the same number', 0),
    (PAIRS * 0, 0.0, 'same', 'the same: every seed ends with the same number', 0),
    (
      *(PAIRS * 0 + 0.01, 0.02, 'unknown'),
      'unknown: all 3 seeds differ by 0.01 nats, which is too coarse a number',
      None,
    ),
    (PAIRS - 0.001, 0.003, 'inconclusive', f'{MORE} 2 more seeds would tell 0.0030 nats', 2),
    (PAIRS - 0.001, 0.0034, 'inconclusive', f'{MORE} 2 more seeds would tell 0.0034 nats', 2),
    (
      np.tile(PAIRS, 4) - 5e-4,
      8e-4,
      'inconclusive',
      f'{MORE} 1 more seed would tell 0.00080 nats',
      1,
    ),
    (PAIRS - 0.001, 1e-4, 'inconclusive', f'{MORE} 2,000 more seeds would tell 0.00010 nats', 1987),
    (
      *(PAIRS - 0.001, 0.0, 'inconclusive'),
      'inconclusive: 3 seeds find only differences of 0.0033 nats and more',
      None,
    ),
    (
      *(PAIRS[:1], 0.01, 'unknown'),
      'unknown: one seed says nothing about noise; at least 1 more is needed',
      1,
    ),
    (
      *(PAIRS[:0], 0.01, 'unknown'),
      'unknown: no seed has ended in both arms; at least 2 are needed',
      2,
    ),
  ],
)
def test_verdicts(differences, margin, outcome, verdict, more):
  reference = np.tile([0.2, 0.5, 0.1], 4)[: len(differences)]
  (found,) = compared([reference, reference + differences], margin)
  assert (found.outcome, found.verdict, found.seeds_needed) == (outcome, verdict, more)
  mirrored = {'better': 'worse', 'worse': 'better'}
  (other,) = compared([reference, reference - differences], margin)
  (upside_down,) = compared([reference, reference + differences], margin, lower_is_better=False)
  assert other.outcome == upside_down.outcome == mirrored.get(outcome, outcome)
  assert upside_down.verdict == ' '.join(mirrored.get(word, word) for word in verdict.split())
  (bare,) = compared([reference, reference + differences], margin, unit='')
  assert bare.verdict == verdict.replace(' nats', '')
  survives_json(found)


def survives_json(found):
  text = json.dumps(dataclasses.asdict(found), allow_nan=False)
  assert statistics.Comparison(**json.loads(text)) == found


def test_words_and_intervals_agree():
  draw = np.random.default_rng(0)
  outcomes = set()
  for _ in range(300):
    arms, seeds = draw.integers(2, 6), draw.integers(2, 7)
    scale, margin = 10.0 ** draw.integers(-6, 6), draw.choice([0.0, 1.0, 3.0])
    runs = draw.standard_normal((arms, seeds)) + draw.choice([0, 1, 4], (arms, 1))
    for c in compared(scale * runs, scale * margin):
      low, high = c.interval
      assert (not low <= 0 <= high) == (c.outcome in DIFFERENT)
      assert (c.p_holm <= 0.05) == (c.outcome in DIFFERENT)
      inside = -scale * margin <= low <= high <= scale * margin
      assert inside >= any(said in c.verdict for said in SMALL)
      assert c.outcome in DIFFERENT or inside == (c.outcome == 'equivalent')
      assert '--' not in c.verdict
      assert ' -' not in c.verdict
      assert (c.seeds_needed == 0) == (c.outcome != 'inconclusive')
      survives_json(c)
      outcomes.add(c.outcome)
  assert outcomes == {'better', 'worse', 'equivalent', 'inconclusive'}


def test_one_seed_has_a_difference_and_nothing_else():
  (found,) = compared([[1.0], [1.5]], 0.01)
  assert found.difference == 0.5
  assert found.interval is found.p_value is found.p_holm is found.pairing_gain is None


def test_only_seeds_of_both_are_compared():
  runs = {'a': {2: 1.0, 0: 3.0, 7: 9.0}, 'b': {0: 3.5, 2: 1.25, 5: 0.0}}
  (found,) = statistics.compare(runs, 'loss', '', True, 0.0)
  assert (found.arms, found.seeds, found.difference) == (['a', 'b'], [0, 2], 0.375)
  assert statistics.compare({'a': {0: 1.0}}, 'loss', '', True, 0.0) == []


@pytest.mark.parametrize(
  ('runs', 'more', 'words'),
  [
    ([[1.0, 2.0], [1.0, math.nan]], {}, 'loss of "arm 1" is nan with seed 1'),
    ([[math.inf, 2.0], [1.0, 1.0]], {}, 'loss of "arm 0" is inf with seed 0'),
    ([[1.0, 2.0], [1.0, 2.0]], {'margin': -0.1}, 'margin = -0.1'),
    ([[1.0, 2.0], [1.0, 2.0]], {'margin': math.nan}, 'margin = nan'),
    ([[1.0, 2.0], [1.0, 2.0]], {'alpha': 0.0}, 'alpha = 0.0'),
    ([[1.0, 2.0], [1.0, 2.0]], {'power': 1.0}, 'power = 1.0'),
    ([[1.0, 2.0], [1.0, 2.0]], {'alpha': 0.9}, 'alpha = 0.9'),
  ],
)
def test_mistakes(runs, more, words):
  with pytest.raises(UserError, match=words.replace('.', '[.]')):
    compared(runs, **more)
