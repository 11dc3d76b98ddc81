"""Runs from beginning to end: what they write, and that they resume exactly."""

import contextlib
import functools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from etils import epath

from lmjax import (
  config,
  errors,
  evaluate,
  experiment,
  generate,
  metrics,
  optimizer,
  profiler,
  record,
  sharding,
  train,
)
from lmjax import workdir as workdir_lib
from lmjax.checkpoint import Checkpoints
from lmjax.errors import UserError
from lmjax.models.positions import POSITIONS
from tests import xla_flags
from tests.invariance_test import curve


def lines(workdir, name) -> list[dict]:
  return [json.loads(line) for line in (workdir / f'{name}.jsonl').read_text().splitlines()]


def final_state(workdir) -> dict[str, np.ndarray]:
  """Every array of the newest checkpoint, by path."""
  parts = experiment.open_run(str(workdir))
  parts = experiment.prepare(parts.config)
  mesh = sharding.make_mesh()
  with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
    _, state, _ = checkpoints.restore(train.init_state(parts, mesh)[0])
  state = state.replace(rng=jax.random.key_data(state.rng))
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def timeless_result(workdir) -> dict:
  result = json.loads((workdir / 'result.json').read_text())
  del result['goodput']
  return result


def assert_same_run(a, b):
  for name in ('ledger', 'metrics'):
    timeless = [
      [{k: v for k, v in line.items() if not k.startswith('perf/')} for line in lines(w, name)]
      for w in (a, b)
    ]
    assert timeless[0] == timeless[1], name
  first, second = final_state(a), final_state(b)
  for path, value in first.items():
    np.testing.assert_array_equal(value, second[path], err_msg=path)


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  c = tiny('clm', **{'model.dropout': 0.1, 'log.sample': 'The', 'log.tensorboard': True})
  return workdir, c, train.run(c, str(workdir))


def test_a_run_writes_what_it_promises(finished):
  workdir, c, result = finished
  assert json.loads((workdir / 'config.json').read_text()) == c
  assert json.loads((workdir / 'result.json').read_text()) == result
  assert [line['step'] for line in lines(workdir, 'ledger')] == list(range(1, 7))
  written = lines(workdir, 'metrics')
  trained = [line for line in written if 'train/loss' in line]
  assert [line['step'] for line in trained] == list(range(1, 7))
  for key in ('train/clm', 'train/accuracy', 'optimizer/lr', 'optimizer/grad_norm'):
    assert key in trained[0]
  for key in ('perf/tokens_per_second', 'perf/mfu', 'perf/data_wait'):
    assert trained[0][key] >= 0
  assert trained[0]['optimizer/lr'] == pytest.approx(5e-3)
  evaluated = [line for line in written if 'eval/valid/loss' in line]
  assert [line['step'] for line in evaluated] == [3, 6]
  assert evaluated[-1].items() >= result['metrics'].items()
  assert list(workdir.glob('events.out.tfevents*'))
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == ['3', '6']
  assert result['sample'].startswith('The')
  assert result['parameters'] == 11_536


def test_a_finished_run_is_left_alone(finished, capsys):
  workdir, c, result = finished
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  assert train.run(c, str(workdir)) == result
  assert 'finished' in capsys.readouterr().out
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before


def test_another_experiment_is_refused_and_cadences_are_free(finished, tiny):
  workdir, c, result = finished
  other = {**c, 'optimizer': {**c['optimizer'], 'lr': 0.5}}
  with pytest.raises(UserError, match=r'optimizer.lr is 0.01 there and 0.5 here'):
    train.run(other, str(workdir))
  assert train.run({**c, 'log': {**c['log'], 'every': 2}}, str(workdir)) == result
  elsewhere = {**c['model'], 'remat': 'full', 'attention': 'splash', 'scan': False}
  assert train.run({**c, 'model': elsewhere}, str(workdir)) == result


@pytest.mark.parametrize('dropout', [0.0, 0.1])
def test_micro_batches_are_free_where_they_draw_no_noise(tiny, tmp_path, dropout):
  c = tiny(**{'model.dropout': dropout})
  (tmp_path / 'config.json').write_text(json.dumps(c))
  refused = pytest.raises(UserError, match='micro_batches is 1 there and 2 here')
  with refused if dropout else contextlib.nullcontext():
    assert workdir_lib.check(epath.Path(tmp_path), {**c, 'micro_batches': 2}) is None


def test_floating_point_work_does_not_depend_on_who_does_it(parts):
  """Kernels say nothing of theirs, and a program on shards shows one device's."""
  made, kernel = parts('clm'), parts('clm', **{'model.attention': 'splash'})
  c = made.config
  tokens, (dim, depth, v) = c['batch'] * c['length'], (16, 2, 261)
  products = depth * (4 * dim**2 + 8 * dim**2) + dim * v
  by_hand = 6 * tokens * products + 12 * depth * dim * tokens * (c['length'] + 1) // 2
  with jax.set_mesh(sharding.make_mesh()), sharding.logical_axes('fsdp'):
    assert made.flops.model == kernel.flops.model == by_hand


def test_nothing_need_be_compiled(tiny, tmp_path):
  """For who looks at arrays: the same numbers, operation by operation."""
  c = tiny(**{'model.depth': 1, 'steps': 1, 'optimizer.warmup_steps': 0, 'evaluate.batches': 1})
  expected = train.run(c, str(tmp_path / 'compiled'))['metrics']
  compiled = []
  with jax.disable_jit(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, '_compile', compiled.append)
    got = train.run(c, str(tmp_path / 'eager'))['metrics']
  assert not compiled
  assert got == pytest.approx(expected, rel=1e-5)


def test_a_window_of_steps_is_traced(tiny, tmp_path):
  c = tiny(**{'model.depth': 1})
  train.run(c, str(tmp_path / 'run'), profile='2:3')
  (trace,) = (tmp_path / 'run' / 'profile').rglob('*.xplane.pb')
  assert trace.stat().st_size > 1000
  for wrong in ('2', '3:2', 'a:b', '0:2', '2:99'):
    with pytest.raises(UserError, match=f'--profile={wrong}'):
      train.run(c, str(tmp_path / 'other'), profile=wrong)
  assert not (tmp_path / 'other').exists()


def test_a_window_that_was_before_is_said_to_be(tmp_path, capsys):
  """As in a run that is resumed after it."""
  with profiler.Window('1:2', tmp_path / 'profile', most=6) as window:
    for step in (4, 5, 6):
      window.before(step)
      window.after(step, ())
  assert 'no trace: the run did not come to the steps 1 to 2' in capsys.readouterr().out
  assert not (tmp_path / 'profile').exists()


def test_eager_products_over_a_part_of_the_devices_are_refused(tiny, tmp_path):
  c = tiny(**{'sharding.strategy': 'fsdp+tensor', 'sharding.data': 4, 'sharding.model': 2})
  c['model'] |= {'vocab_multiple': 2}
  with jax.disable_jit(), pytest.raises(UserError, match='--debug cannot leave a part'):
    train.run(c, str(tmp_path / 'run'))


def test_evaluation_is_planned_with_its_own_rows(parts):
  """15 % of the places, whatever training predicts."""
  made = parts('mlm', **{'objective.rate': 0.4})
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  lowered = evaluate.lower(made, mesh, made.abstract_params(mesh))
  shapes = {x.shape for x in jax.tree.leaves(lowered.args_info[0][1])}
  rows, length = made.config['batch'], made.config['length']
  assert shapes == {(rows, length), (rows, math.ceil(0.15 * length))}


def test_evaluate_says_what_the_run_said(finished):
  workdir, _, result = finished
  values = evaluate.run(str(workdir))
  assert values.pop('step') == 6
  assert values == pytest.approx(result['metrics'], rel=1e-6)
  assert json.loads((workdir / 'eval_6.json').read_text())['step'] == 6
  assert evaluate.run(str(workdir), step=3)['eval/valid/loss'] != values['eval/valid/loss']
  with pytest.raises(UserError, match='needs length = 64'):
    evaluate.run(str(workdir), windows=2)
  with pytest.raises(UserError, match='4'):
    evaluate.run(str(workdir), step=4)


def test_bits_per_byte_are_of_the_original_text(finished):
  """The sum of all nats, over the bytes of the text and ln 2, whatever the tokens are."""
  _, c, result = finished
  numbers = result['metrics']
  text = pathlib.Path(c['data']['eval']['valid']).read_text(encoding='utf-8')
  documents = text.split('\n')
  size = sum(len(d.encode()) for d in documents)
  tokens = size + len(documents)  # bytes, and an end for each document
  nats = numbers['eval/valid/xent'] * tokens
  assert numbers['eval/valid/bits_per_byte'] == pytest.approx(nats / size / math.log(2), rel=1e-6)
  assert numbers['eval/valid/perplexity'] == pytest.approx(math.exp(numbers['eval/valid/xent']))


class Killed(BaseException):
  pass


@pytest.mark.parametrize('at', [2, 5])
@pytest.mark.parametrize(
  'objective', [('clm', {'model.dropout': 0.1}), ('mlm', {'objective.next_sentence': True})]
)
def test_resume_is_exact(tiny, tmp_path, monkeypatch, objective, at):
  name, overrides = objective
  c = tiny(name, **overrides, **{'optimizer.ema': 0.9})
  train.run(c, str(tmp_path / 'straight'))
  push = metrics.Log.push

  def killed(self, step, *args):
    push(self, step, *args)
    if step == at:
      raise Killed

  monkeypatch.setattr(metrics.Log, 'push', killed)
  with pytest.raises(Killed):
    train.run(c, str(tmp_path / 'broken'))
  monkeypatch.undo()
  # What a killed process was writing:
  for name in ('metrics', 'ledger'):
    with (tmp_path / 'broken' / f'{name}.jsonl').open('a') as file:
      file.write('{"step": 9, "')
  train.run(c, str(tmp_path / 'broken'))
  assert_same_run(tmp_path / 'straight', tmp_path / 'broken')
  results = [timeless_result(tmp_path / w) for w in ('straight', 'broken')]
  assert results[0] == results[1]
  assert len({results[0]['params_fingerprint'], results[0]['state_fingerprint']}) == 2


def as_file(c, directory) -> str:
  """The flag that names an experiment file with this config."""
  (directory / 'experiment.py').write_text(
    'import json\nfrom ml_collections import ConfigDict\n'
    f'def get_config():\n  return ConfigDict(json.loads({json.dumps(c)!r}))\n'
  )
  return f'--config={directory / "experiment.py"}'


def test_kill_9_and_the_same_command_again(tiny, tmp_path):
  c = tiny('clm', steps=150, **{'checkpoint.every': 10, 'evaluate.every': 150, 'log.every': 5})
  command = [sys.executable, '-m', 'lmjax.main', as_file(c, tmp_path), '--workdir']
  straight, broken = tmp_path / 'straight', tmp_path / 'broken'
  environment = os.environ | {'XLA_FLAGS': xla_flags(1)}
  run = functools.partial(subprocess.run, check=True, capture_output=True, env=environment)
  run([*command, str(straight)], timeout=300)
  process = subprocess.Popen([*command, str(broken)], stdout=subprocess.DEVNULL, env=environment)
  while not (broken / 'checkpoints' / '40').exists():
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not (broken / 'result.json').exists()
  assert b'resuming at step ' in run([*command, str(broken)], timeout=300).stdout
  assert_same_run(straight, broken)


def test_resume_on_another_mesh_sees_the_same_batches(tiny, tmp_path, monkeypatch):
  c = tiny('clm')
  train.run(c, str(tmp_path / 'straight'))
  one = sharding.make_mesh(devices=jax.devices()[:1])
  push = metrics.Log.push

  def killed(self, step, *args):
    push(self, step, *args)
    if step == 4:
      raise Killed

  monkeypatch.setattr(metrics.Log, 'push', killed)
  with pytest.raises(Killed):
    train.run(c, str(tmp_path / 'moved'))
  monkeypatch.undo()
  monkeypatch.setattr(sharding, 'make_mesh', lambda *_: one)
  train.run(c, str(tmp_path / 'moved'))
  first, second = (lines(tmp_path / run, 'ledger') for run in ('straight', 'moved'))
  assert first == second
  losses = [
    [line['train/loss'] for line in lines(tmp_path / run, 'metrics') if 'train/loss' in line]
    for run in ('straight', 'moved')
  ]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_data_that_changed_are_refused(tiny, tmp_path, corpus):
  data = tmp_path / 'train.txt'
  data.write_text((corpus / 'train.txt').read_text())
  c = tiny('clm', **{'data.train': str(data), 'checkpoint.every': 3, 'steps': 3})
  train.run(c, str(tmp_path / 'run'))
  (tmp_path / 'run' / 'result.json').unlink()
  data.write_text('Other text. ' * 40 + '\n' + data.read_text())
  with pytest.raises(UserError, match='data "train" changed'):
    train.run(c, str(tmp_path / 'run'))


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tiny, tmp_path):
  # The first update, in the warm-up, is of half the rate; the second step meets what it made.
  overrides = {'optimizer.name': 'sgd', 'optimizer.lr': 1e30, 'log.every': 2}
  c = tiny('clm', steps=60, **overrides, **{'checkpoint.every': 1, 'evaluate.every': 60})
  said = (
    r'step 2: the loss is nan; the losses before it were 5\.\d+; not finite is the gradient of '
    r'core/.* and 17 more; checkpoint 1 is the last good one'
  )
  with pytest.raises(errors.NonFinite, match=said):
    train.run(c, str(tmp_path / 'run'))
  assert errors.NonFinite.exit_code == 70
  assert [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['1']
  assert [line['step'] for line in lines(tmp_path / 'run', 'metrics')] == [1]


def test_warm_start_takes_the_parameters(finished, tiny, tmp_path):
  workdir, _, result = finished
  c = tiny('clm', init_from=str(workdir), steps=3, **{'optimizer.lr': 1e-9})
  warm = train.run(c, str(tmp_path / 'warm'))
  loss = 'eval/valid/loss'
  assert warm['metrics'][loss] == pytest.approx(result['metrics'][loss], rel=1e-4)
  wider = tiny('clm', init_from=str(workdir), **{'model.dim': 32})
  with pytest.raises(UserError, match='does not fit'):
    train.run(wider, str(tmp_path / 'wide'))
  with pytest.raises(UserError, match='no run in'):
    train.run(tiny('clm', init_from=str(tmp_path / 'none')), str(tmp_path / 'none2'))


def test_average_of_parameters_is_what_is_evaluated(tiny, tmp_path):
  c = tiny('clm', **{'optimizer.ema': 0.99, 'optimizer.lr': 0.03})
  result = train.run(c, str(tmp_path / 'run'))
  plain = train.run(tiny('clm', **{'optimizer.lr': 0.03}), str(tmp_path / 'plain'))
  loss = 'eval/valid/loss'
  assert abs(result['metrics'][loss] - plain['metrics'][loss]) > 1e-3
  assert evaluate.run(str(tmp_path / 'run'))[loss] == pytest.approx(result['metrics'][loss])


@pytest.mark.parametrize('name', ['adam', 'sgd', 'adamw', 'lamb', 'lion', 'adafactor', 'muon'])
def test_every_optimizer_trains_and_resumes(tiny, tmp_path, name):
  rate = {'sgd': 1.0, 'lion': 3e-3, 'adafactor': 0.1, 'lamb': 0.1}.get(name, 0.02)
  c = tiny('clm', steps=20, **{'optimizer.name': name, 'optimizer.lr': rate, 'evaluate.every': 20})
  train.run(c, str(tmp_path))
  losses = [line['train/loss'] for line in lines(tmp_path, 'metrics') if 'train/loss' in line]
  assert losses[-1] < 0.93 * losses[0], losses
  (tmp_path / 'result.json').unlink()
  train.run(c, str(tmp_path))  # from the last checkpoint: nothing is left to do but to evaluate


@pytest.mark.parametrize('objective', ['clm', 'mlm'])
@pytest.mark.parametrize('positions', POSITIONS)
def test_every_kind_of_positions_trains(parts, objective, positions):
  overrides = {'model.positions': positions, 'optimizer.lr': 0.02}
  losses = curve(parts(objective, steps=20, **overrides), devices=1, steps=20)[:, 0]
  assert losses[-5:].mean() < 0.9 * losses[0], losses


def test_diff_names_the_cause_first(finished, tiny, tmp_path):
  workdir, c, _ = finished
  assert list(record.diff(str(workdir), str(workdir))) == []
  train.run({**c, 'seed': 1}, str(tmp_path / 'other'))
  said = list(record.diff(str(workdir), str(tmp_path / 'other')))
  assert said[0] == 'config: seed: 0 | 1'
  assert any(line.startswith('ledger: first differs at step 1') for line in said)
  assert any(line.startswith('loss: first differs at step 1') for line in said)
  assert said[-1].startswith('state: the fingerprints at the end are')


def test_best_checkpoint_is_kept(tiny, tmp_path):
  c = tiny(
    'clm',
    steps=10,
    **{
      'checkpoint.every': 2,
      'evaluate.every': 2,
      'checkpoint.keep_last': 1,
      'checkpoint.keep_best': 'eval/valid/loss',
      'optimizer.lr': 0.3,
      'optimizer.schedule': 'constant',
    },
  )
  train.run(c, str(tmp_path / 'run'))
  losses = {
    x['step']: x['eval/valid/loss']
    for x in lines(tmp_path / 'run', 'metrics')
    if 'eval/valid/loss' in x
  }
  best = min(losses, key=losses.__getitem__)
  saved = {int(p.name) for p in (tmp_path / 'run' / 'checkpoints').iterdir()}
  assert saved == {best, 10}


def test_state_lies_where_the_rules_say(parts):
  mesh = sharding.make_mesh()
  for name in ('adamw', 'adafactor', 'muon'):
    like, _, make = train.init_state(parts('clm', **{'optimizer.name': name}), mesh)
    state = make()
    for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(state), strict=True):
      assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
  assert optimizer.averaged(state.opt_state) is None


def test_config_in_json_survives_the_round_trip(tiny):
  c = tiny('mlm')
  assert config.resolve(json.loads(json.dumps(c))) == c


def test_a_run_needs_no_evaluation_set_and_generates_without_its_corpus(tiny, tmp_path, corpus):
  data = tmp_path / 'train.txt'
  data.write_text((corpus / 'train.txt').read_text())
  c = {**tiny('clm', **{'data.train': str(data)})}
  c['data'] = {**c['data'], 'eval': {}}
  assert train.run(c, str(tmp_path / 'run'))['metrics'] == {}
  data.unlink()
  parts, mesh = experiment.open_run(str(tmp_path / 'run')), sharding.make_mesh()
  _, params = evaluate.restore_params(parts, str(tmp_path / 'run'), mesh)
  assert generate.continue_text(parts, params, 'The', 5).startswith('The')


def test_a_relative_workdir_is_one(tiny, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  result = train.run(tiny('clm'), 'runs/relative')
  assert evaluate.run('runs/relative')['eval/valid/loss'] == result['metrics']['eval/valid/loss']


def test_averages_of_a_warm_start_begin_with_its_parameters(finished, tiny, tmp_path):
  workdir, _, result = finished
  c = tiny('clm', init_from=str(workdir), steps=3, **{'optimizer.lr': 1e-9, 'optimizer.ema': 0.999})
  warm, loss = train.run(c, str(tmp_path / 'warm')), 'eval/valid/loss'
  assert warm['metrics'][loss] == pytest.approx(result['metrics'][loss], rel=1e-4)


def test_an_evaluation_set_that_changed_is_refused(tiny, tmp_path, corpus):
  valid = tmp_path / 'valid.txt'
  valid.write_text((corpus / 'valid.txt').read_text())
  train.run(tiny('clm', **{'data.eval': {'valid': str(valid)}}), str(tmp_path / 'run'))
  valid.write_text('Other text. ' * 40)
  with pytest.raises(UserError, match='data "valid" changed'):
    evaluate.run(str(tmp_path / 'run'))


@pytest.mark.parametrize(
  ('overrides', 'said'),
  [
    (
      {'log.sample': 'A prompt longer than the 48 positions of the model'},
      'fills the 48 positions',
    ),
    ({'checkpoint.keep_best': 'eval/valid/los'}, 'eval/valid/loss'),
    (
      {'checkpoint.keep_best': 'eval/valid/loss', 'checkpoint.every': 2},
      'multiple of evaluate.every',
    ),
  ],
)
def test_what_the_end_of_a_run_needs_is_checked_at_its_beginning(tiny, tmp_path, overrides, said):
  with pytest.raises(UserError, match=said):
    train.run(tiny('clm', **overrides), str(tmp_path / 'run'))
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_bits_per_byte_are_left_out_where_the_tokens_lose_text(parts, tmp_path):
  known, unknown = tmp_path / 'known.txt', tmp_path / 'unknown.txt'
  text = pathlib.Path(parts('clm').config['data']['train']).read_text()
  known.write_text(text[:2000])
  unknown.write_text(text[:2000] + '☃')
  sets = {'known': str(known), 'unknown': str(unknown)}
  c = config.base(tokenizer='characters').to_dict()['tokenizer']
  made = experiment.prepare({**parts('clm', **{'data.eval': sets}).config, 'tokenizer': c})
  evaluator = evaluate.Evaluator(made, sharding.make_mesh())
  assert [evaluator._encodes_all_text(name) for name in sets] == [True, False]


def test_an_objective_without_cross_entropy_has_no_perplexity(parts):
  made, mesh = parts('mlm'), sharding.make_mesh()
  params, model = train.init_state(made, mesh)[2]().params, made.model

  def apply(variables, batch, train):
    terms, numbers = model.apply(variables, batch, train=train)
    return terms, {'mlm_accuracy': numbers['mlm_accuracy']}

  vars(made)['model'] = types.SimpleNamespace(apply=apply)
  values = evaluate.Evaluator(made, mesh)(params)
  assert set(values) == {f'eval/valid/{key}' for key in ('loss', 'mlm', 'mlm_accuracy')}


def test_a_line_shows_the_loss_once():
  values = {'train/loss': 2.5, 'train/clm': 2.5, 'train/xent': 2.5, 'optimizer/lr': 1.0}
  assert metrics.line(3, values, 9) == 'step 3/9  loss 2.5  optimizer/lr 1'


def test_a_second_start_compiles_nothing(tiny, tmp_path):
  events = []
  listen = lambda event, **_: events.append(event.rpartition('/')[2])
  config = tiny(cache=str(tmp_path / 'cache'), steps=3)
  jax.monitoring.register_event_listener(listen)
  for name in ('first', 'second'):
    jax.clear_caches()
    events.clear()
    train.run(config, tmp_path / name)
    assert ('cache_misses' in events) == (name == 'first')
  # The first may meet small programs of its own a second time, when two threads want one at once.
  assert 'cache_hits' in events
  jax.monitoring.unregister_event_listener(listen)
