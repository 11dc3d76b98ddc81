"""All of a run's time is accounted for, through kills and roll-backs."""

import contextlib
import time

import pytest

from lmjax import goodput, train
from tests.guard_test import STEPS, Killed, fault, killed_after, one_device  # noqa: F401


@pytest.fixture
def hands(monkeypatch):
  """A clock with hands to move."""
  now = [1e9]
  monkeypatch.setattr(time, 'time', lambda: now[0])
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])

  def move(seconds):
    now[0] += seconds

  return move


def test_every_second_goes_to_one_kind(tmp_path, hands):
  (tmp_path / 'config.json').touch()
  with goodput.Clock(tmp_path) as clock:
    hands(2)
    with clock.of('productive'):
      hands(10)
      clock.timed('input_wait', hands)(1)
      with contextlib.suppress(Killed), clock.of('evaluate'):
        hands(3)
        raise Killed
      saved = clock.mark()
      hands(5)
  hands(100)
  with goodput.Clock(tmp_path) as clock:
    clock.timed('restore', hands)(4)
    clock.take_up(saved)
    with clock.of('productive'):
      hands(7)
    found = clock.summary()
  expected = {
    'productive': 17,
    'lost': 5,
    'input_wait': 1,
    'evaluate': 3,
    'restore': 4,
    'down': 100,
  }
  assert found == dict.fromkeys(goodput.KINDS, 0) | expected | {'other': 2, 'wall': 132}
  assert sum(found.values()) == 2 * 132


def test_a_clock_that_is_set_back_loses_nothing(tmp_path, hands):
  (tmp_path / 'config.json').touch()
  with goodput.Clock(tmp_path) as clock:
    hands(5)
  hands(-50)
  with goodput.Clock(tmp_path) as clock:
    assert clock.summary()['down'] == 0


def test_a_run_that_is_killed_and_goes_back_accounts_for_its_time(tiny, tmp_path, monkeypatch):
  c = tiny(**{**STEPS, 'guard.on_bad': 'roll_back', 'log.every': 1})
  with monkeypatch.context() as patch:
    killed_after(patch, 5)
    with pytest.raises(Killed):
      train.run(c, str(tmp_path))
  time.sleep(0.5)
  fault(monkeypatch, [7])
  found = train.run(c, str(tmp_path))['goodput']
  wall = found.pop('wall')
  assert sum(found.values()) == pytest.approx(wall, rel=0.01)
  assert 0.5 <= found['down'] < 10
  assert all(seconds > 0 for seconds in found.values()), found
