"""Seeds that one program trains together are, each, the run that it is alone."""

import json
import pathlib
import shlex
import time

import jax
import numpy as np
import pytest

from lmjax import ablate, evaluate, guard, sharding, train
from lmjax.ablate import runs, vmapped
from lmjax.data import loader
from lmjax.errors import Restart, UserError
from lmjax.saving import Saving
from tests.ablate_test import QUICK
from tests.train_test import lines

SGD = {'optimizer.name': 'sgd', 'optimizer.lr': 0.1, 'evaluate.every': 3, 'checkpoint.every': 2}
CASES = {
  'dropout, micro-batches': ('clm', {'model.dropout': 0.1, 'micro_batches': 2}),
  'an average': ('mlm', {'objective.next_sentence': True, 'optimizer.ema': 0.9}),
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  make = sharding.make_mesh
  one = lambda sizes=None, devices=None: make(sizes, devices or jax.devices()[:1])
  monkeypatch.setattr(sharding, 'make_mesh', one)


@pytest.fixture(scope='module')
def pair(tiny):
  objective, own = CASES['dropout, micro-batches']
  return tiny(objective, **own, **SGD)


@pytest.fixture(scope='module')
def alone(pair, tmp_path_factory):
  """The directory with a run of each seed by itself."""
  where = tmp_path_factory.mktemp('alone')
  with pytest.MonkeyPatch.context() as patch:
    make = sharding.make_mesh
    one = lambda sizes=None, devices=None: make(sizes, devices or jax.devices()[:1])
    patch.setattr(sharding, 'make_mesh', one)
    for seed in (0, 1):
      train.run({**pair, 'seed': seed}, where / str(seed))
  return where


def assert_same(together: pathlib.Path, alone: pathlib.Path) -> None:
  """But for the time that each took."""
  assert lines(together, 'ledger') == lines(alone, 'ledger')
  found, expected = lines(together, 'metrics'), lines(alone, 'metrics')
  assert len(found) == len(expected)
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    numbers = {key: x for key, x in other.items() if not key.startswith('perf/')}
    assert {key: one[key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
  records = [json.loads((run / 'record.json').read_text()) for run in (together, alone)]
  assert records[0]['initial'] == records[1]['initial']
  results = [json.loads((run / 'result.json').read_text()) for run in (together, alone)]
  assert results[0]['metrics'] == pytest.approx(results[1]['metrics'], rel=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_each_is_what_it_is_alone(tiny, tmp_path, name):
  objective, own = CASES[name]
  c = tiny(objective, **own, **SGD)
  vmapped.run(c, [0, 1], tmp_path / 'together')
  for seed in (0, 1):
    train.run({**c, 'seed': seed}, tmp_path / str(seed))
    assert_same(tmp_path / 'together' / str(seed), tmp_path / str(seed))
  first, second = (lines(tmp_path / 'together' / seed, 'ledger') for seed in '01')
  assert first != second
  # What is saved is a run like any other.
  found = evaluate.run(tmp_path / 'together' / '1')
  last = json.loads((tmp_path / 'together' / '1' / 'result.json').read_text())['metrics']
  assert {key: found[key] for key in last} == pytest.approx(last, rel=1e-5)


def test_each_learning_rate_is_what_it_is_alone(tiny, tmp_path):
  own = {'optimizer.weight_decay': 0.1, 'optimizer.clip': 1.0, 'steps': 4}
  rates = {rate: tmp_path / str(rate) for rate in (1e-2, 3e-3)}
  vmapped.run(tiny('clm', **own), [0, 1], [*rates.items(), (1e-2, tmp_path / 'again')])
  assert (tmp_path / 'again' / '1' / 'result.json').exists()
  for rate, seed in ((1e-2, 1), (3e-3, 0)):
    c = tiny('clm', **own, **{'optimizer.lr': rate})
    train.run({**c, 'seed': seed}, tmp_path / 'alone' / str(rate))
    assert_same(rates[rate] / str(seed), tmp_path / 'alone' / str(rate))
    assert (
      json.loads((rates[rate] / str(seed) / 'config.json').read_text())['optimizer']['lr'] == rate
    )


def test_one_killed_between_the_saves_of_two_seeds_is_taken_up(pair, alone, tmp_path, monkeypatch):
  class Killed(BaseException):
    pass

  save = Saving.save

  def until(self, step, *args):
    if step == 4 and self._about['config']['seed'] == 1:
      raise Killed
    save(self, step, *args)

  with monkeypatch.context() as patch:
    patch.setattr(Saving, 'save', until)
    with pytest.raises(Killed):
      vmapped.run(pair, [0, 1], tmp_path)
  steps = [sorted(int(x.name) for x in (tmp_path / s / 'checkpoints').iterdir()) for s in '01']
  assert [max(x) for x in steps] == [4, 2]
  groups = []
  make = vmapped._Group
  monkeypatch.setattr(vmapped, '_Group', lambda *x: groups.append(x) or make(*x))
  vmapped.run(pair, [0, 1], tmp_path)
  assert [(start, len(seeds)) for start, seeds in groups] == [(4, 1), (2, 1)]
  for seed in '01':
    assert_same(tmp_path / seed, alone / seed)
  vmapped.run(pair, [0, 1], tmp_path)  # nothing is left to do
  assert len(groups) == 2


def test_what_is_asked_to_stop_saves_all_seeds_and_they_go_on_alone_or_together(
  pair, alone, tmp_path, monkeypatch
):
  asked = iter([False] * 3 + [True])
  with monkeypatch.context() as patch:
    patch.setattr(vmapped.stopping.Stop, 'tick', lambda _: next(asked))
    with pytest.raises(Restart, match='after step 3 of 6, which is saved'):
      vmapped.run(pair, [0, 1], tmp_path)
  train.run({**pair, 'seed': 0}, tmp_path / '0')
  vmapped.run(pair, [0, 1], tmp_path)
  assert_same(tmp_path / '0', alone / '0')
  assert_same(tmp_path / '1', alone / '1')


@pytest.mark.parametrize('ill', [{1}, {0, 1}], ids=['one', 'all'])
def test_seeds_that_their_numbers_stop_leave_the_others_alone(
  pair, alone, tmp_path, monkeypatch, ill
):
  batch = loader.Loader.batch

  def poisoned(self, step):
    found = batch(self, step)
    if self.seed in ill and step == 2:
      found['weights'] = found['weights'] * np.nan
    return found

  with monkeypatch.context() as patch:
    patch.setattr(loader.Loader, 'batch', poisoned)
    vmapped.run(pair, [0, 1], tmp_path)
  if ill == {1}:
    assert_same(tmp_path / '0', alone / '0')
  assert guard.stopped(tmp_path / '1').startswith('step 3: the loss is nan')
  assert not (tmp_path / '1' / 'result.json').exists()
  vmapped.run(pair, [0, 1], tmp_path)  # it has come to its end
  assert not (tmp_path / '1' / 'result.json').exists()


def test_time_is_shared(pair, tmp_path, monkeypatch, capsys):
  evaluate = vmapped._Group.evaluate
  monkeypatch.setattr(vmapped._Group, 'evaluate', lambda *x: time.sleep(1) or evaluate(*x))
  log = {**pair['log'], 'every': 2}  # step 4 comes after an evaluation, and is no slower for it
  vmapped.run({**pair, 'log': log}, [0, 1, 2], tmp_path)
  said = capsys.readouterr().out
  assert all(f'seed {seed}: step 4/6  loss' in said for seed in (0, 1, 2))
  (rate,) = (
    x['perf/tokens_per_second']
    for x in lines(tmp_path / '0', 'metrics')
    if x['step'] == 4 and 'train/loss' in x
  )
  assert rate > 2 * 3 * pair['batch'] * pair['length']  # a step of all is faster than 0.5 s
  clocks = [json.loads((tmp_path / s / 'result.json').read_text())['goodput'] for s in '012']
  for clock in clocks:
    parts = sum(seconds for kind, seconds in clock.items() if kind != 'wall')
    assert parts == pytest.approx(clock['wall'] / 3, rel=0.05)
  assert json.loads((tmp_path / '0' / 'record.json').read_text())['machine']['runs'] == 3


MISTAKES = {
  'decisions': (
    {'guard.on_bad': 'skip'},
    'guard.on_bad = "skip" is decided run by run: without --vmap',
  ),
  'many devices': ({}, 'on one device, and here are 8: --parallel=8 lets arms share them'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes(tiny, tmp_path, monkeypatch, name):
  own, said = MISTAKES[name]
  monkeypatch.undo()
  with pytest.raises(UserError, match=said):
    vmapped.run(tiny('clm', **own), [0, 1], tmp_path)
  assert not list(tmp_path.glob('*/config.json'))


def test_an_ablation_trains_arm_by_arm(tmp_path):
  made = ablate.Ablation(QUICK, tmp_path, ['label=a,b'], seeds=3, vmap='seeds')
  made.runs = runs.planned(made._asked, made.seeds, tmp_path)
  made.runs[0].workdir.mkdir(parents=True)
  (made.runs[0].workdir / 'result.json').write_text('{}')
  first, second = (job.command for job in made.jobs())
  assert shlex.split(first)[2:] == [
    'lmjax.ablate.vmapped',
    f'--config={QUICK}',
    '--seeds=1,2',
    f'--workdir={tmp_path}/runs/label=a',
    '--config.check=False',
  ]
  assert '--seeds=0,1,2' in second
  assert 'check' not in second
  with pytest.raises(UserError, match='without --vmap_seeds'):
    ablate.Ablation(QUICK, tmp_path, ['label=a,b'], match='time', vmap='seeds')


def test_an_ablation_trains_learning_rates_together(tmp_path):
  vary = ['label=a,b', 'optimizer.lr=0.1,0.2']
  made = ablate.Ablation(QUICK, tmp_path, vary, seeds=2, vmap='lr')
  made.runs = runs.planned(made._asked, made.seeds, tmp_path)
  first, second = (job.command for job in made.jobs())
  assert shlex.split(first)[2:] == [
    'lmjax.ablate.vmapped',
    f'--config={QUICK}',
    '--seeds=0,1',
    '--lr=0.1',
    f'--workdir={tmp_path}/runs/label=a,optimizer.lr=0.1',
    '--lr=0.2',
    f'--workdir={tmp_path}/runs/label=a,optimizer.lr=0.2',
  ]
  assert 'label=b' in second
