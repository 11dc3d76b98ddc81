"""Ablations: arms differ in what was named, get equally much, and survive what runs survive."""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from lmjax import ablate, config, sharding, train, workdir
from lmjax.ablate import arms, budget, fixed, matching, runs, slots
from lmjax.ablate.fixed import Facts
from lmjax.errors import StorageError, UserError
from lmjax.evaluate import Evaluator
from tests import xla_flags

QUICK, RATE = 'experiments/quickstart.py', 'experiments/ablations/mask_rate.py'
SPACED = pathlib.Path('/tmp/a b')
VARIED = {
  ('optimizer.lr=0.1,0.2',): ['optimizer.lr=0.1', 'optimizer.lr=0.2'],
  ('config.steps=1,2', 'batch=4,8'): [
    'steps=1,batch=4',
    'steps=1,batch=8',
    'steps=2,batch=4',
    'steps=2,batch=8',
  ],
  ('label=one,two',): ['label=one', 'label=two'],
  ('label=don\'t,"a, b"',): ["label=don't", 'label=%22a, b%22'],
  ('variant=gpt,bert',): ['variant=gpt', 'variant=bert'],
  ('optimizer.args={"a": (1, 2)},{"b": "x,y"}',): [
    "optimizer.args={%22a%22: (1, 2)}",
    "optimizer.args={%22b%22: %22x,y%22}",
  ],
  ('data.train=a/b.txt,../c.txt',): ['data.train=a%2Fb.txt', 'data.train=..%2Fc.txt'],
}  # fmt: skip


@pytest.mark.parametrize('vary', VARIED, ids=' '.join)
def test_arms_are_every_combination_and_have_names_for_directories(vary):
  found = arms.of(QUICK, vary)
  assert [arm.name for arm in found] == VARIED[vary]
  assert not any('/' in arm.name for arm in found)


def test_without_vary_the_arms_are_those_of_the_file():
  found = arms.of(RATE, [])
  assert [arm.overrides for arm in found] == config.arms(RATE)


MISTAKES = {
  'one arm': (['steps=5'], 'there is one arm only (steps=5)'),
  'a key twice': (['steps=5,6', 'steps=7,8'], 'a key is varied twice'),
  'seeds': (['seed=1,2'], 'every arm gets the same seeds'),
  'a value twice': (['steps=5,5'], 'two arms are called steps=5'),
  'no value': (['steps='], '--vary=steps= is not KEY=V1,V2'),
  'no key': (['=1,2'], '--vary==1,2 is not KEY=V1,V2'),
  'no sweep': ([], 'experiments/quickstart.py has no sweep()'),
  'a name too long': (['log.sample=' + 'x' * 300 + ',y'], 'too long for the name of a directory'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_in_arms(name):
  vary, said = MISTAKES[name]
  with pytest.raises(UserError) as e:
    arms.of(QUICK, vary)
  assert said in str(e.value)


def test_a_run_is_a_command_line():
  first, again = runs.planned(arms.of(QUICK, ['variant=bert,gpt', 'label=a'])[:1], [3, 4], SPACED)
  assert first.command == (
    'python -m lmjax.main --config=experiments/quickstart.py:bert --config.seed=3 '
    "'--workdir=/tmp/a b/runs/variant=bert,label=a/3'"
  )
  # The oracles are tried once in each arm.
  assert [run.command.endswith('--config.check=False') for run in (first, again)] == [False, True]
  assert first.arm.config()['objective']['name'] == 'mlm'


# -------------------------------------------------------------------------- nothing else may move

MOVED = {  # vary, may_move -> what is said, '' where nothing is
  'a value': (['optimizer.lr=0.1,0.2'], [], ''),
  'nothing at all': (['label=a,b'], [], ''),
  'a value that is the default': (['optimizer.lr=0.02,2e-2'], [], 'optimizer.lr has the same'),
  'a variant': (['variant=gpt,bert'], [], 'objective.dynamic is None, True'),
  'a variant, half named': (['variant=gpt,bert'], ['objective'], 'log.sample is'),
  'a variant, named': (['variant=gpt,bert'], ['objective', 'log.sample'], ''),
}


@pytest.mark.parametrize('name', MOVED)
def test_what_moves_is_named_or_refused(name):
  vary, may_move, said = MOVED[name]
  found = arms.of(QUICK, vary)
  moved = arms.moved({arm.name: arm.config() for arm in found})
  if not said:
    arms.check_moved(moved, found, may_move)
    return
  with pytest.raises(UserError) as e:
    arms.check_moved(moved, found, may_move)
  assert said in str(e.value)


FACTS = Facts(
  parameters=1000,
  flops=60_000,
  steps=100,
  tokens=10,
  batch=2,
  tokenizer='t',
  sources={'train': 'a', 'validation': 'b'},
  rows='r',
  sets={'validation': 'v'},
  partial=frozenset(),
  windows='w',
  causal=True,
  metrics=frozenset(['eval/validation/xent', 'eval/validation/bits_per_byte']),
)
# What is said to move -> the second arm, a key that can have moved it, and one that cannot.
CAUSES = {
  'parameters': ({'parameters': 1001}, 'model.dim', 'optimizer.lr'),
  'flops_per_token': ({'flops': 70_000}, 'model.depth', 'batch'),
  'all_tokens': ({'steps': 90}, 'batch', 'model.dim'),
  'tokenizer': ({'tokenizer': 'u'}, 'tokenizer.vocab_size', 'model.dim'),
  'sources': ({'sources': {'train': 'c', 'validation': 'b'}}, 'data.train', 'objective.rate'),
  'rows': ({'rows': 's'}, 'objective.pairs_per_row', 'model.dim'),
  'sets': ({'sets': {'validation': 'w'}}, 'length', 'optimizer.name'),
}


@pytest.mark.parametrize('fact', CAUSES)
def test_what_moves_by_itself_is_refused(fact):
  changed, cause, other = CAUSES[fact]
  facts = [FACTS, FACTS._replace(**changed)]
  for named in (cause, 'variant'):
    fixed.check(facts, [named])
  with pytest.raises(UserError, match=f'nobody has named: {fact}: '):
    fixed.check(facts, [other])
  fixed.check([FACTS, FACTS], [other])


def test_the_proof_says_what_is_the_same():
  facts = [FACTS, FACTS._replace(parameters=2000, batch=4)]
  assert fixed.lines(facts) == [
    'parameters: 1,000, 2,000',
    'FLOPs a token: the same, 6000',
    'steps: the same, 100',
    'tokens in all: the same, 1,000',
    'FLOPs in all: the same, 6e+06',
    'tokenizer: the same, t',
    'order of the text: the same rows one after the other, so many in a step as the batch has',
    'rows of validation: the same, v',
  ]


def test_a_metric_that_an_arm_does_not_report_is_said_before_anything_runs(monkeypatch, tmp_path):
  made = ablate.Ablation(QUICK, tmp_path, ['optimizer.lr=0.1,0.2'])
  monkeypatch.setattr(fixed, 'of', lambda arm: FACTS)
  made.prove()
  made.check_metric('')
  made.check_metric('eval/validation/xent')
  with pytest.raises(
    UserError, match=r'=0.1 does not report eval/valid/xent .did you mean "eval/va'
  ):
    made.check_metric('eval/valid/xent')


def test_arms_of_which_no_number_compares_are_refused_before_anything_runs(monkeypatch, tmp_path):
  made = ablate.Ablation(QUICK, tmp_path, ['objective.z_loss=0,1e-4'])
  of = {None: FACTS, 1: FACTS._replace(sets={'validation': 'w'}, sources={'validation': 'x'})}
  monkeypatch.setattr(fixed, 'of', lambda arm: of[1 if '1e-4' in arm.name else None])
  monkeypatch.setattr(fixed, 'check', lambda *_: None)
  made.prove()
  with pytest.raises(UserError, match=r'share no number .* --config.evaluate.yardstick=64'):
    made.check_metric('')
  with pytest.raises(
    UserError, match='"eval/validation/xent" does not compare: the arms are asked'
  ):
    made.check_metric('eval/validation/xent')


def test_what_an_arm_reports_is_known_beforehand(parts):
  made = parts('clm', **{'evaluate.yardstick': 2, 'length': 64})
  found = Evaluator(made, sharding.make_mesh())(
    train.init_state(made, sharding.make_mesh())[2]().params
  )
  assert set(fixed._reported(made)) == found.keys()


def test_a_plan_of_all_seeds():
  found = arms.of(QUICK, ['model.depth=4,300'])
  memory = {'peak': 1.5, 'evaluation': 2.0, 'capacity': 80.0}
  entries = [
    {'fits': True, 'memory_gib': memory, 'hours': 0.25},
    {'fits': False, 'memory_gib': {**memory, 'peak': 99.0, 'evaluation': None}, 'hours': None},
  ]
  assert budget.lines(found, entries, 3, 2.0) == [
    'model.depth=4: 2.00 of 80.00 GiB; 3 x 0.25 hours at least, price 1.50',
    'model.depth=300: DOES NOT FIT, 99.00 of 80.00 GiB',
    'one after the other: 0.75 hours at least, price 1.50',
  ]
  assert budget.lines(found[:1], entries[:1], 3, None) == [
    'model.depth=4: 2.00 of 80.00 GiB; 3 x 0.25 hours at least'
  ]


COMPARABLE = {  # second arm, named -> metrics of those below that compare
  'what a model sees': (
    {'causal': False, 'sets': {'validation': 'w'}, 'sources': {'validation': 'c'}},
    ['variant'],
    {'masked_xent'},
  ),
  'a learning rate': (
    {},
    ['optimizer.lr'],
    {'xent', 'loss', 'bits_per_byte', 'masked_xent', 'pseudo_xent'},
  ),
  'an objective': (
    {},
    ['objective.z_loss'],
    {'xent', 'bits_per_byte', 'masked_xent', 'pseudo_xent'},
  ),
  'other rows': (
    {'sets': {'validation': 'w'}},
    ['objective.rate'],
    {'bits_per_byte', 'masked_xent', 'pseudo_xent'},
  ),
  'a tokenizer': (
    {'sets': {'validation': 'w'}, 'tokenizer': 'u'},
    ['tokenizer.vocab_size'],
    {'bits_per_byte'},
  ),
  'sets of other names': (
    {'sets': {'test': 'v'}, 'sources': {'train': 'a', 'test': 'b'}},
    ['data.eval'],
    {'masked_xent', 'pseudo_xent'},
  ),
  'other texts': (
    {
      'sets': {'validation': 'w'},
      'sources': {'train': 'a', 'validation': 'c'},
      'windows': 'x',
    },
    ['data.eval'],
    set(),
  ),
  'another part': (
    {'sets': {'validation': 'w'}, 'partial': frozenset(['validation'])},
    ['length'],
    {'masked_xent', 'pseudo_xent'},
  ),
  'the same part': (
    {'partial': frozenset(['validation'])},
    ['optimizer.lr'],
    {'xent', 'loss', 'bits_per_byte', 'masked_xent', 'pseudo_xent'},
  ),
}


@pytest.mark.parametrize('name', COMPARABLE)
def test_which_numbers_compare(name):
  other, named, expected = COMPARABLE[name]
  kinds = ('xent', 'loss', 'bits_per_byte')
  reported = {f'eval/validation/{kind}' for kind in kinds}
  reported |= {f'eval/yardstick/{kind}_xent' for kind in ('masked', 'pseudo')}
  first = FACTS._replace(partial=other.get('partial', FACTS.partial))
  found = fixed.comparable([first, FACTS._replace(**other)], named, reported)
  assert found.keys() == reported
  assert {metric.rpartition('/')[2] for metric, why in found.items() if not why} == expected


@pytest.mark.parametrize(
  ('other', 'named', 'why'),
  [
    ({}, ['optimizer.lr'], ''),
    ({'batch': 4}, ['batch'], ''),
    ({}, ['objective.rate'], 'the objective is another'),
    ({}, ['variant'], 'the objective is another'),
    ({'rows': 's'}, ['length'], 'the arms read other rows'),
    ({'tokenizer': 'u', 'rows': 's'}, ['tokenizer.vocab_size'], 'tokenizers of their own'),
  ],
)
def test_whether_losses_of_training_compare(other, named, why):
  found = fixed.training([FACTS, FACTS._replace(**other)], named)
  assert why in found
  assert bool(found) == bool(why)


def test_rows_that_are_not_evaluated_do_not_count(tiny, tmp_path):
  batches = {'evaluate.batches': 1, 'evaluate.yardstick': 2, 'length': 64}
  file = written(tmp_path, tiny('clm', **batches))
  small, large = map(fixed.of, arms.of(file, ['batch=2,4']))
  assert small.partial == large.partial == {'valid'}
  assert small.sets['valid'] != large.sets['valid']
  assert small.windows == large.windows != ''
  whole = map(fixed.of, arms.of(written(tmp_path, tiny('clm', length=64)), ['batch=2,4']))
  assert len({(x.partial, x.sets['valid'], x.windows) for x in whole}) == 1


# ---------------------------------------------------------------------------------- equally much


def test_matched_arms_get_as_much_as_the_reference():
  found = arms.of(QUICK, ['model.depth=4,3,12'])
  cost = {4: 40.0, 3: 30.0, 12: 117.0}
  solved, said = matching.solve(found, lambda arm: cost[arm.config()['model']['depth']], 'flops')
  steps = [arm.config()['steps'] for arm in solved]
  assert steps == [350, 467, 120]
  assert said == ['', '0.07% more FLOPs', '0.29% more FLOPs']
  assert solved[0].solved == {}
  second = solved[1].config()
  assert (second['optimizer']['warmup_steps'], second['evaluate']['every']) == (27, 234)
  assert second['model']['depth'] == 3


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ({'checkpoint': 100, 'evaluate': 50}, (134, 67)),
    ({'checkpoint': 50, 'evaluate': 175}, (67, 234)),
    ({'checkpoint': 7, 'evaluate': 7}, (9, 9)),
  ],
)
def test_checkpoints_that_are_evaluated_stay_so(given, expected):
  """keep_best wants it of all of them."""
  config = arms.Arm(QUICK, {f'{key}.every': value for key, value in given.items()}).config()
  solved = matching._scaled(arms.Arm(QUICK, {'model.depth': 3}), config, 467)
  assert (solved['checkpoint.every'], solved['evaluate.every']) == expected


def test_what_is_named_is_not_solved_for():
  found = arms.of(QUICK, ['batch=16,32', 'optimizer.warmup_steps=10'])
  solved, said = matching.solve(found, lambda arm: arm.config()['batch'], 'tokens')
  assert solved[1].config()['steps'] == 175
  assert solved[1].config()['optimizer']['warmup_steps'] == 10
  assert said == ['', '']
  with pytest.raises(UserError, match='take one of both'):
    matching.solve(arms.of(QUICK, ['steps=50,60']), lambda arm: 1, 'tokens')
  with pytest.raises(UserError, match='costs more tokens than all'):
    matching.solve(found, lambda arm: 1 if arm is found[0] else 1000, 'tokens')


def test_what_was_measured_holds_when_it_goes_on(monkeypatch, tmp_path):
  monkeypatch.setattr(fixed, 'of', lambda arm: FACTS)

  def proved(seconds: dict[int, float]) -> list[tuple]:
    made = ablate.Ablation(QUICK, tmp_path, ['model.depth=4,2'], match='time')
    monkeypatch.setattr(made, '_seconds_of_a_step', lambda a: seconds[a.config()['model']['depth']])
    assert made.prove()[2].startswith('steps: 350, ')
    made.keep()
    return [(arm.config()['steps'], made.remainders[arm.name]) for arm in made.arms]

  first = proved({4: 0.4, 2: 0.3})
  assert first == [(350, ''), (467, '0.07% more seconds')]
  assert proved({4: 0.4, 2: 0.1}) == first


TAKEN_UP = {
  'as it was': (['lr=0.2,0.1'], 'steps', {}, ''),
  'an arm more': (['lr=0.1,0.2,0.4'], 'steps', {}, ''),
  'an arm less': (['lr=0.1,0.4'], 'steps', {}, 'which has an arm optimizer.lr=0.2 too: name it'),
  'another config': (['lr=0.1,0.2,0.4'], 'steps', {'batch': 8}, 'whose arms have other configs'),
  'matched otherwise': (['lr=0.1,0.2'], 'tokens', {}, 'or are matched otherwise'),
  'measured': (['lr=0.1,0.2'], 'time', {}, ''),
  'not measured': (['lr=0.1,0.2,0.4'], 'time', {}, 'without optimizer.lr=0.4, and how long a step'),
}  # fmt: skip


@pytest.mark.parametrize('name', TAKEN_UP)
def test_arms_are_added_and_none_is_taken_away(monkeypatch, tmp_path, name):
  monkeypatch.setattr(fixed, 'of', lambda arm: FACTS)
  monkeypatch.setattr(ablate.Ablation, '_seconds_of_a_step', lambda self, arm: 0.1)
  (vary,), match, overrides, wrong = TAKEN_UP[name]
  before = ablate.Ablation(
    QUICK, tmp_path, ['optimizer.lr=0.1,0.2'], 1, match if 'measured' in name else ''
  )
  before.prove()
  before.keep()
  now = ablate.Ablation(QUICK, tmp_path, [f'optimizer.{vary}'], 1, match, overrides=overrides)
  if wrong:
    with pytest.raises(UserError) as e:
      now.prove()
    assert wrong in str(e.value)
    return
  now.prove()
  now.keep()
  kept = json.loads((tmp_path / 'ablation.json').read_text())['arms']
  assert list(kept) == [arm.name for arm in now.arms]
  there = {run.arm.name: run.workdir for run in before.runs}
  assert there.items() <= {run.arm.name: run.workdir for run in now.runs}.items()


def test_keys_that_have_come_since_are_as_they_are_by_default(monkeypatch, tmp_path):
  monkeypatch.setattr(fixed, 'of', lambda arm: FACTS)
  made = ablate.Ablation(QUICK, tmp_path, ['optimizer.lr=0.1,0.2'])
  made.prove()
  made.keep()
  kept = json.loads((tmp_path / 'ablation.json').read_text())
  for arm in kept['arms'].values():
    del arm['config']['tokenizer']['opening']
  (tmp_path / 'ablation.json').write_text(json.dumps(kept))
  made.prove()


def test_who_adds_to_it_or_asks_otherwise_looks_once_more(monkeypatch, tmp_path):
  monkeypatch.setattr(fixed, 'of', lambda arm: FACTS)

  def look(vary: str, pairs: list[int], metric: str = 'xent') -> str:
    made = ablate.Ablation(QUICK, tmp_path, [f'optimizer.lr={vary}'])
    made.prove()
    made.keep()
    return ''.join(made._look(metric, [{'seeds': list(range(n))} for n in pairs]))

  assert not look('0.1,0.2', [1]), 'of one seed there is no verdict'
  assert not look('0.1,0.2', [2])
  assert not look('0.1,0.2', [2])
  first, second = 'optimizer.lr=0.1', 'optimizer.lr=0.2'
  said = f'there were 2 looks (xent of 1 beside {first}, 2 pairs of runs; '
  assert look('0.1,0.2,0.4', [2, 1]) == ''
  assert look('0.1,0.2,0.4', [2, 2]).startswith(f'{said}xent of 2 beside {first}, 4 pairs of runs)')
  assert 'there were 3 looks (' in look('0.1,0.2,0.4', [3, 2])
  assert f'; loss of 2 beside {first}, 5 pairs of runs), with' in look(
    '0.1,0.2,0.4', [3, 2], 'loss'
  )
  assert f'; loss of 2 beside {second}, 5 pairs' in look('0.2,0.1,0.4', [3, 2], 'loss')


def test_slots_share_the_machine(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 3})
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  monkeypatch.setattr(slots, '_devices', lambda: ('cpu', 1))
  assert [slot.cores for slot in slots.slots(2)] == [{0, 1}, {2, 3}]
  assert slots.slots(1)[0].cores == {0, 1, 2, 3}
  with pytest.raises(UserError, match='does not divide the 4 CPU cores'):
    slots.slots(3)
  monkeypatch.setattr(slots, '_devices', lambda: ('gpu', 8))
  found = slots.slots(4)
  assert [s.environment['CUDA_VISIBLE_DEVICES'] for s in found] == ['0,1', '2,3', '4,5', '6,7']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', 'GPU-a,GPU-b')
  monkeypatch.setattr(slots, '_devices', lambda: ('gpu', 2))
  assert [s.environment['CUDA_VISIBLE_DEVICES'] for s in slots.slots(2)] == ['GPU-a', 'GPU-b']
  monkeypatch.setattr(slots, '_devices', lambda: ('tpu', 4))
  assert [s.environment['TPU_VISIBLE_CHIPS'] for s in slots.slots(4)] == ['0', '1', '2', '3']
  with pytest.raises(UserError, match='--parallel=4 or 1'):
    slots.slots(2)


# -------------------------------------------------------------------------------------- for real


def written(where, c):
  """A file with this experiment."""
  file = where / 'experiment.py'
  file.write_text(
    'import json\nfrom ml_collections import ConfigDict\n'
    f'def get_config():\n  return ConfigDict(json.loads({json.dumps(c)!r}))\n'
  )
  return str(file)


@pytest.fixture
def command(tiny, tmp_path):
  """The command of an ablation of two names for one experiment, but for its last arguments."""
  c = tiny('clm', steps=60, **{'checkpoint.every': 10, 'evaluate.every': 60, 'log.every': 5})
  file = written(tmp_path, c)
  where = tmp_path / 'ablation'
  return where, [sys.executable, '-m', 'lmjax.ablate', f'--config={file}', f'--workdir={where}']


def test_two_names_for_one_experiment_killed_in_the_middle(command):
  where, argv = command
  argv = [*argv, '--vary=label=one,two', '--seeds=2']
  environment = os.environ | {'XLA_FLAGS': xla_flags(1)}
  first, second = (where / 'runs' / f'label={name}' / '0' for name in ('one', 'two'))

  def until(run, step, number):
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, env=environment)
    while not (run / 'checkpoints' / str(step)).exists():
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(number)
    return process.wait(timeout=60)

  assert until(first, 10, signal.SIGTERM) == 75
  assert not workdir.owner(first)  # it was waited for
  assert not (first / 'result.json').exists()
  assert 'SIGTERM' in first.with_name('0.log').read_text()
  assert until(second, 20, signal.SIGKILL) == -signal.SIGKILL
  begun = (first / 'result.json').stat().st_mtime

  # What goes wrong in an arm is said, and the others go on.
  config_of = second / 'config.json'
  kept = config_of.read_text()
  config_of.write_text(kept.replace('"steps": 60', '"steps": 61'))
  done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=300)
  assert done.returncode == 2
  assert 'ended with 2: ' in done.stderr
  assert done.stderr.endswith('lmjax: not run to the end: label=two\n')
  told = (where / 'report.md').read_text()
  assert '2 of 4 runs are not finished' in told
  assert '(steps is 61 there and 60 here)' in told
  assert not (second.parent / '1').exists()
  config_of.write_text(kept)
  seen = subprocess.run([*argv, '--launch=none'], capture_output=True, text=True, check=True)
  assert 'label=two beside label=one: unknown: no seed has ended in both arms' in seen.stdout
  assert not (second / 'result.json').exists()

  done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=300)
  assert done.returncode == 0, done.stderr
  assert (first / 'result.json').stat().st_mtime == begun
  assert 'the same: every seed ends with the same number' in done.stdout
  study = json.loads((where / 'report.json').read_text())
  (comparison,) = study['comparisons']
  assert (comparison['outcome'], comparison['difference']) == ('same', 0.0)
  assert study['arms'][0]['deviation'] > 0
  lines = study['fixed']['lines']
  assert 'batches seen: the same, bit for bit, in 2 of 2 pairs of runs' in lines
  assert lines[-1].endswith('those of the reference in 20 of 20 arrays, in each seed')
  assert all('did other work too' in said for said in study['caveats'])
  assert comparison['verdict'] in (where / 'report.html').read_text()
  assert comparison['verdict'] in (where / 'report.md').read_text()

  file = argv[3].removeprefix('--config=')
  more = ablate.Ablation(file, where, ['label=one,two'], seeds=3)
  more.prove()
  assert [run.outcome()[0] for run in more.runs] == ['finished'] * 4 + ['unfinished'] * 2
  left = [*argv[:-1], '--seeds=3', '--launch=print']
  said = subprocess.run(left, capture_output=True, text=True, check=True)
  assert said.stdout.splitlines() == [run.command for run in more.runs[4:]]
  for run in more.runs[4:]:  # as if they had run
    shutil.copytree(more.runs[0].workdir, run.workdir)
  *_, caveat = more.study('again')['caveats']
  assert caveat.startswith('there were 2 looks (eval/valid/xent of 1 beside label=one, 2 pairs of')


def test_a_plan_compiles_all_arms_and_runs_none(command):
  where, argv = command
  argv += ['--vary=optimizer.lr=0.1,0.2', '--plan=cpu:1', '--seeds=2', '--price_per_hour=2']
  done = subprocess.run(argv, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  *_, first, second, total = done.stdout.splitlines()
  for rate, said in (('0.1', first), ('0.2', second)):
    form = r'[\d.]+ of [\d.]+ GiB; 2 x \S+ hours at least, price [\d.]+'
    assert re.fullmatch(rf'optimizer\.lr={rate}: {form}', said)
  assert total.startswith('one after the other: ')
  assert not where.exists()


class Process:
  """In place of a run: ends with these codes, one start after the other."""

  pid = 0

  def __init__(self, code: int):
    self.code = code

  def poll(self) -> int:
    return self.code

  wait = kill = terminate = poll


@pytest.fixture
def ended(monkeypatch, tmp_path):
  """ended(codes) -> what becomes of a run whose starts end so."""

  def end(*codes: int, steps: bool = False) -> tuple[str, str]:
    left = iter(codes)
    (run,) = runs.planned(arms.of(QUICK, ['label=a,b'])[:1], [0], tmp_path)

    def start(argv, stdout, **_):
      run.workdir.mkdir(parents=True, exist_ok=True)
      stdout.write(b'compiled the step\nlmjax: the loss is not finite\n')
      code = next(left)
      if code == 70:
        event = {'event': 'stop', 'step': 9, 'batch': 9, 'why': 'the loss is nan'}
        (run.workdir / 'events.jsonl').write_text(json.dumps(event) + '\n')
      if code == 0:
        (run.workdir / 'result.json').write_text('{}')
      if steps:
        count = len(list((run.workdir / 'checkpoints').glob('*')))
        (run.workdir / 'checkpoints' / str(count)).mkdir(parents=True)
      return Process(code)

    monkeypatch.setattr(subprocess, 'Popen', start)
    monkeypatch.setattr(os, 'sched_setaffinity', lambda *_: None)
    monkeypatch.setattr(runs, 'POLL', 0)
    assert list(runs.work(runs.jobs([run]), [slots.Slot({}, frozenset())])) == [run]
    assert runs.jobs([run]) == []  # it has ended, for good
    return run.outcome()

  return end


@pytest.mark.parametrize('leaves', [True, False])
def test_a_run_whose_ablation_was_killed_has_time_to_save(ended, monkeypatch, tmp_path, leaves):
  path = tmp_path / 'runs' / 'label=a' / '0'
  path.mkdir(parents=True)
  monkeypatch.setattr(runs, 'LEAVES', 60 if leaves else 0)
  held = contextlib.ExitStack()
  held.enter_context(workdir.owned(path))
  if leaves:
    threading.Timer(0.5, held.close).start()
    assert ended(0) == ('finished', '')
  else:
    with held, pytest.raises(UserError, match=f'another run is at work in {path}: process'):
      ended(0)


def test_ends_of_runs(ended):
  assert ended(-signal.SIGKILL, 75, 0) == ('finished', '')


def test_a_run_that_comes_further_is_not_given_up(ended):
  assert ended(*[75] * (3 * runs.TRIES), 0, steps=True) == ('finished', '')


def test_a_run_that_its_numbers_stop_is_an_outcome(ended):
  assert ended(70) == ('diverged', 'step 9: the loss is nan')


@pytest.mark.parametrize(('code', 'error'), [(1, RuntimeError), (2, UserError), (74, StorageError)])
def test_a_mistake_ends_the_ablation(ended, capsys, code, error):
  with pytest.raises(error, match=r'not run to the end: label=a'):
    ended(code)
  assert f' ended with {code}: the loss is not finite\n' in capsys.readouterr().err


def test_a_run_that_leaves_without_an_end_is_no_success(ended, capsys, monkeypatch):
  monkeypatch.setattr(runs.Run, 'outcome', lambda _: ('unfinished', ''))
  with pytest.raises(RuntimeError, match='not run to the end: label=a'):
    ended(0)
  assert 'has left some of its runs unfinished' in capsys.readouterr().err


def test_a_run_without_progress_ends_the_ablation(ended, capsys):
  with pytest.raises(UserError, match='not run to the end: label=a'):
    ended(*[75] * 100)
  assert f'{runs.TRIES} times without a new checkpoint' in capsys.readouterr().err


@pytest.fixture
def collected(tmp_path):
  """collected(values by arm and seed, …) -> the study of runs that have ended so."""

  def collect(
    values, restarts=(), rates=None, clocks=(), events=(), astray=(), machine=(), metric='', **about
  ):
    clocks, events = dict(clocks), dict(events)
    seeds = range(len(next(iter(values.values()))))
    asked = arms.of(QUICK, [f'label={",".join(values)}'])
    told = {'match': 'steps', 'alpha': 0.05, 'power': 0.8, 'price_per_hour': None, 'parallel': 1}
    told['fixed'] = {'lines': []}
    told |= {'remainders': {arm.name: '' for arm in asked}, **about}
    planned = runs.planned(asked, seeds, tmp_path)
    for run in planned:
      run.workdir.mkdir(parents=True)
      value = values[run.arm.overrides['label']][run.seed]
      names = ('validation/xent', 'validation/loss', 'yardstick/masked_xent')
      metrics = {f'eval/{name}': value for name in names}
      clock = {'productive': 3600.0, 'input_wait': 0.0, 'evaluate': 360.0, 'down': 1e6, 'wall': 1e7}
      clock |= clocks.get(run.arm.overrides['label'], {})
      result = {'metrics': metrics, 'goodput': clock}
      event = {'event': 'skip', 'step': 1, 'batch': 0}
      event |= events.get(run.arm.overrides['label'], {})
      if events:
        (run.workdir / 'events.jsonl').write_text(json.dumps(event) + '\n')
      seen = run.workdir.parts[-2:] if run.seed in astray else run.seed
      line = json.dumps({'step': 1, 'hash': str(seen)})
      (run.workdir / 'ledger.jsonl').write_text(line + '\n')
      (run.workdir / 'result.json').write_text(json.dumps(result))
      if rates:
        rate = rates[run.arm.overrides['label']][run.seed]
        line = {'step': 1, 'train/loss': value, 'perf/tokens_per_second': rate}
        (run.workdir / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
      record = {
        'code': 'a',
        'machine': dict(machine),
        'restarts': [{'step': 1, 'began': '', 'changed': x} for x in restarts],
      }
      (run.workdir / 'record.json').write_text(json.dumps(record))
    study = ablate.report.collect(told, asked, [FACTS] * len(asked), planned, metric)
    json.dumps(study, allow_nan=False)
    return study

  return collect


def test_an_arm_whose_last_update_overflows_is_an_outcome(collected):
  values = {'a': [1.0, 1.1, 1.2], 'b': [1.1, math.nan, 1.3], 'c': [1.3, 1.4, 1.6]}
  study = collected(values)
  b, c = study['comparisons']
  assert (b['outcome'], b['interval'], b['p_value']) == ('diverged', None, None)
  assert b['verdict'] == 'stopped by its numbers: label=b in 1 of 3 seeds'
  assert c['outcome'] == 'worse'
  assert any('label=b seed 1' in said for said in study['caveats'])
  (reference,) = collected({'d': [math.inf], 'e': [1.0]})['comparisons']
  assert reference['outcome'] == 'diverged'


def test_what_had_changed_when_a_run_went_on_is_said(collected):
  changed = {'code': ['a', 'b'], 'environment.CUDA_VISIBLE_DEVICES': ['0', '1'], 'seed': [1, 1]}
  (caveat,) = collected({'a': [1.0], 'b': [2.0]}, restarts=[{}, changed])['caveats']
  assert caveat == 'code was a, then b where these went on: label=a seed 0, label=b seed 0'


@pytest.mark.parametrize(
  ('fast', 'said'), [(86, []), (88, ['label=a trained on 70 to 88 tokens a'])]
)
def test_a_machine_that_does_other_work_is_said(collected, fast, said):
  rates = {'a': [fast, 70], 'b': [400, 499]}
  found = collected({'a': [1.0, 1.1], 'b': [2.0, 2.3]}, rates=rates)['caveats']
  assert [x.partition('other work too: ')[2] for x in found] == [f'{x} second' for x in said]


def test_runs_that_share_a_machine_share_its_price(collected):
  study = collected({'a': [1.0], 'b': [2.0]}, price_per_hour=8.0, parallel=4)
  assert [arm['price'] for arm in study['arms']] == [2.2, 2.2], 'evaluations are paid for too'


CAVEATS = {
  'batches': (dict(astray=[1]), 'in 1 of 2 pairs runs have seen other batches, which nothing'),
  'time': (
    dict(match='time', clocks={'b': {'productive': 3300.0}}),
    'arms are matched by time, and label=b has trained 8% less',
  ),
  'guard': (
    dict(events={'b': {'batch': 1}}, astray=[1]),
    'the guard has left batches out that others have seen: label=a seed 0, label=b seed 0, label=a',
  ),
  'yardstick': (
    dict(metric='eval/yardstick/masked_xent'),
    'eval/yardstick/masked_xent is of 0 windows of 62 tokens: what another text would say is in no',
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', CAVEATS)
def test_what_has_to_be_read_before_a_verdict(collected, name):
  how, said = CAVEATS[name]
  (caveat,) = collected({'a': [1.0, 1.1], 'b': [2.0, 2.3]}, **how)['caveats']
  assert caveat.startswith(said)


def test_nothing_need_be_read_before_a_verdict(collected):
  close, replayed = {'b': {'productive': 3500.0}}, {'a': {'batch': 0}}
  how = dict(match='time', clocks=close, events=replayed, machine={'runs': 2})
  study = collected({'a': [1.0, 1.1], 'b': [2.0, 2.3]}, **how)
  assert not study['caveats']
  seen, together, *_ = study['fixed']['lines']
  assert seen == 'batches seen: the same, bit for bit, in 2 of 2 pairs of runs'
  assert together.startswith('4 of 4 runs were trained in one program with others, and the command')


def test_an_ablation_is_kept_on_a_disk_and_in_no_run(tmp_path):
  with pytest.raises(UserError, match='gs://bucket/x is in a bucket: '):
    ablate.Ablation(QUICK, 'gs://bucket/x', ['label=a,b'])
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='holds a run: choose another'):
    ablate.Ablation(QUICK, tmp_path, ['label=a,b'])


def test_what_all_arms_are_given(tmp_path):
  given = {'steps': 7, 'check': False, 'optimizer.lr': 0.5}
  found = arms.of(QUICK, ['optimizer.lr=0.1,0.2'], given)
  assert [arm.name for arm in found] == ['optimizer.lr=0.1', 'optimizer.lr=0.2']
  for arm, rate in zip(found, (0.1, 0.2), strict=True):
    c = arm.config()
    assert (c['steps'], c['check'], c['optimizer']['lr']) == (7, False, rate)
    assert {'--config.steps=7', '--config.check=False'} < set(arm.flags())


def test_an_arm_that_does_not_survive_is_not_judged_by_those_that_did():
  made = {'arms': ['a', 'b'], 'outcome': 'better', 'verdict': 'better by 1'}
  told = {
    runs.Run(arms.Arm(QUICK, {'label': name}), seed, pathlib.Path('x'), True): {'status': status}
    for name, seed, status in (
      ('a', 0, 'finished'),
      ('b', 0, 'finished'),
      ('a', 1, 'finished'),
      ('b', 1, 'diverged'),
    )
  }
  names = {'arms': ['label=a', 'label=b']}
  said = ablate.report._said(made | names, told)
  assert said['outcome'] == 'diverged'
  assert said['verdict'] == 'stopped by its numbers: label=b in 1 of 2 seeds'
