"""Two runs' records say in what they differ, the causes first, or that they are the same."""

import json

import pytest

from lmjax import record
from lmjax.errors import UserError


@pytest.fixture
def run(tmp_path, monkeypatch):
  """run(name, **changes) -> the directory of a run that is finished; what it says of itself."""
  monkeypatch.setenv('XLA_FLAGS', '--a')
  monkeypatch.setenv('JAX_API_KEY', 'hunter2')

  def make(name, config=(), about=(), data='d0', hashes='abc', losses=(3.0, 2.0, 1.0), **result):
    directory = tmp_path / name
    directory.mkdir()
    told = {'machine': {'devices': {'cpu': 8}, 'driver': '1'}, 'parameters': 7, 'seed': 0}
    described = record.describe({'train': data}, told | dict(about))
    write = lambda file, text: (directory / file).write_text(text)
    write('config.json', json.dumps({'seed': 0, 'log': {'every': 1}} | dict(config)))
    write('record.json', json.dumps(described))
    rows = [{'step': i + 1, 'hash': h} for i, h in enumerate(hashes)]
    write('ledger.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
    rows = [{'step': i + 1, 'train/loss': x} for i, x in enumerate(losses)]
    write('metrics.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
    write('result.json', json.dumps({'state_fingerprint': 'f' * 16} | result))
    return str(directory)

  return make


def test_runs_that_are_the_same_are_said_to_be(run, tmp_path):
  a, b = run('a'), run('b')
  assert list(record.diff(a, b)) == []
  assert record.verdict(a, b).startswith('the runs are the same: every batch, every loss')
  assert 'f' * 16 in record.verdict(a, b)
  (tmp_path / 'b' / 'result.json').unlink()
  assert list(record.diff(a, b)) == []
  said = 'the runs differ in nothing that was recorded, up to step 3'
  assert record.verdict(a, b) == said


def test_causes_come_before_what_follows_from_them(run, monkeypatch):
  a = run('a')
  monkeypatch.setattr(record, '_commit', lambda: 'other+')
  monkeypatch.setattr(record, '_version', lambda package: '0')
  monkeypatch.setenv('XLA_FLAGS', '--b')
  b = run(
    'b',
    config={'seed': 1},
    about={'machine': {'devices': {'gpu': 1}, 'driver': '2'}, 'parameters': 8, 'seed': 1},
    data='d1',
    hashes='axx',
    losses=(3.0, 2.0, 1.5),
    state_fingerprint='e' * 16,
  )
  said = list(record.diff(a, b))
  order = ['config: seed', 'record: code', 'record: versions.', 'record: machine.devices.cpu']
  order += ['record: machine.driver', "record: environment.XLA_FLAGS: '--a' | '--b'"]
  order += ['record: parameters: 7 | 8', 'record: seed', "record: data.train: 'd0' | 'd1'"]
  order += [
    'ledger: first differs at step 2: hash b | x',
    'loss: first differs at step 3: train/loss 1.0 | 1.5',
  ]
  order += ['state: the fingerprints at the end are ffffffffffffffff | eeeeeeeeeeeeeeee']
  places = [next(i for i, line in enumerate(said) if line.startswith(start)) for start in order]
  assert places == sorted(places)
  assert said[places[-1] :] == [order[-1]]


def test_what_is_named_like_a_secret_is_masked(run, tmp_path):
  run('a')
  text = (tmp_path / 'a' / 'record.json').read_text()
  assert 'hunter2' not in text
  assert json.loads(text)['environment']['JAX_API_KEY'] == '***'


def test_a_restart_on_other_ground_is_a_difference(run, tmp_path):
  a, b = run('a'), run('b')
  path = tmp_path / 'b' / 'record.json'
  first = json.loads(path.read_text())
  same = record.restarted(first, first, 10, '2026')
  assert same['restarts'] == [{'step': 10, 'began': '2026', 'changed': {}}]
  path.write_text(json.dumps(same))
  assert list(record.diff(a, b)) == []
  other = first | {'machine': {'devices': {'gpu': 1}, 'driver': '1'}}
  path.write_text(json.dumps(record.restarted(same, other, 20, '2027')))
  assert list(record.diff(a, b)) == [
    f'restart: {b} at step 20: machine.devices.cpu: 8, then None',
    f'restart: {b} at step 20: machine.devices.gpu: None, then 1',
  ]
  assert list(record.diff(b, b)) == []


def test_losses_over_other_numbers_of_steps_are_not_compared(run):
  a, b = run('a'), run('b', config={'log': {'every': 2}}, losses=(9.0,))
  said = list(record.diff(a, b))
  assert said[0] == 'config: log.every: 1 | 2'
  assert said[1].startswith('loss: not compared')


def test_a_decision_is_named_before_what_follows_from_it(run, tmp_path):
  a, b = run('a'), run('b', losses=(3.0, 2.5, 1.0))
  (tmp_path / 'b' / 'events.jsonl').write_text('{"event": "skip", "step": 2, "why": "it"}\n')
  said = list(record.diff(a, b))
  assert said[0] == 'event: the first that differs is none | event skip, step 2, why it'
  assert said[1].startswith('loss: first differs at step 2')


@pytest.mark.parametrize(
  ('name', 'harm', 'said'),
  [
    ('ledger', lambda rows: rows[:2], 'ledger: not the same lines: hash of step 3 | nothing more'),
    ('ledger', lambda rows: [], 'ledger: not the same lines: hash of step 1 | nothing more'),
    (
      'ledger',
      lambda rows: [rows[0], *rows],
      'ledger: not the same lines: hash of step 2 | hash of step 1',
    ),
    (
      'metrics',
      lambda rows: [*rows, {'step': 3, 'eval/a/loss': 2.5}],
      'loss: not the same lines: nothing more | eval/a/loss of step 3',
    ),
    (
      'metrics',
      lambda rows: [rows[0], rows[1] | {'optimizer/lr': 0.1}, rows[2]],
      'loss: not the same lines: train/loss of step 2 | optimizer/lr of step 2',
    ),
    ('metrics', lambda rows: [row | {'perf/mfu': 0.5} for row in rows], ''),
  ],
)
def test_no_line_is_missing_or_there_twice(run, tmp_path, name, harm, said):
  a, b = run('a'), run('b')
  path = tmp_path / 'b' / f'{name}.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  path.write_text(''.join(json.dumps(row) + '\n' for row in harm(rows)))
  assert list(record.diff(a, b)) == ([said] if said else [])


def test_a_run_at_work_is_compared_as_far_as_it_is(run, tmp_path):
  a, b = run('a'), run('b', hashes='ab', losses=(3.0,))
  (tmp_path / 'b' / 'result.json').unlink()
  assert list(record.diff(a, b)) == []


def test_the_same_state_is_said_whatever_differs_on_the_way(run, monkeypatch, capsys):
  a, b = run('a'), run('b', config={'log': {'every': 2}})
  for first, second, yet in ((a, b, True), (a, a, False), (a, run('c', state_fingerprint='0'), 0)):
    monkeypatch.setattr('sys.argv', ['record', 'diff', first, second])
    record.main()
    assert ('and yet the state at the end is the same' in capsys.readouterr().out) == yet


def test_no_run_is_said_to_be_none(run, tmp_path):
  with pytest.raises(UserError, match='there is no run in'):
    list(record.diff(run('a'), str(tmp_path / 'none')))
