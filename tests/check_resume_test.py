"""`check resume` says what it sees, and is not content with less."""

import json
import re

import pytest

from lmjax import record
from lmjax.check import resume
from tests.processes_test import spawn
from tests.train_test import as_file


def test_an_experiment_that_resumes_exactly(tiny, tmp_path):
  c = tiny('clm', **{'model.dropout': 0.1, 'checkpoint.keep_best': 'eval/valid/loss'})
  arguments = ['-m', 'lmjax.check', 'resume', as_file(c, tmp_path), '--steps=4', '--kills=1']
  process = spawn(arguments)
  said, errors = process.communicate(timeout=300)
  assert process.returncode == 0, said + errors
  assert re.search(r'^4 steps without a stop: state [0-9a-f]{16}$', said, re.M)
  assert re.search(r'^killed when step \d was logged$', said, re.M)
  assert 'the runs are the same: every batch, every loss, and the state at the end' in said
  assert said.endswith('\na run that is taken up is the one that was never stopped\n')
  assert re.search(
    r'on with 2 instead of 4 device\(s\): the same batches; losses differ by \d', said
  )


@pytest.fixture
def runs(monkeypatch):
  """runs(**harm) -> whether the check holds where runs are made up: harm[name](step) is a loss."""

  def make(exact=False, **harm):
    def run(workdir, kill_after=0, delay=0.0, environment=None):
      workdir.mkdir(exist_ok=True)
      write = lambda name, text: (workdir / name).write_text(text)
      loss = harm.get(workdir.name, lambda step: 5.0 - step)
      steps = range(1, 5)
      about = {'machine': {'devices': {'cpu:cpu': 4}}, 'parameters': 1, 'seed': 0}
      write('config.json', json.dumps({'log': {'every': 1}}))
      write('record.json', json.dumps(record.describe({}, about)))
      hash_ = harm.get('hash', {}).get(workdir.name, 'a')
      write('ledger.jsonl', ''.join(json.dumps({'step': s, 'hash': hash_}) + '\n' for s in steps))
      rows = (json.dumps({'step': s, 'train/loss': loss(s)}) + '\n' for s in steps)
      write('metrics.jsonl', ''.join(rows))
      state = harm.get('state', {}).get(workdir.name, 'f')
      write('result.json', json.dumps({'state_fingerprint': state}))
      return kill_after

    monkeypatch.setattr(resume, 'run', run)
    section = {'checkpoint': {}, 'evaluate': {}, 'log': {}, 'optimizer': {'warmup_steps': 9}}
    return resume.prove({**section, 'deterministic_sum': exact}, steps=4, kills=1)

  return make


@pytest.mark.parametrize(
  ('harm', 'holds'),
  [
    ({}, True),
    ({'moved': lambda step: 5.000001 - step}, True),
    ({'state': {'moved': 'e'}}, True),
    ({'state': {'moved': 'e'}, 'exact': True}, False),
    ({'broken': lambda step: 5.000001 - step}, False),
    ({'state': {'broken': 'e'}}, False),
    ({'hash': {'broken': 'b'}}, False),
    ({'hash': {'moved': 'b'}}, False),
    ({'moved': lambda step: 5.001 - step}, False),
  ],
)
def test_what_is_not_as_promised_is_seen(runs, harm, holds, capsys):
  assert runs(**harm) == holds
  said = capsys.readouterr().out
  if not holds and 'broken' in str(harm):
    assert 'the runs are the same' not in said
  state = {'exact': 'ANOTHER state', 'state': 'as rounding has it, another state'}
  if 'moved' in harm.get('state', {}):
    assert state['exact' if 'exact' in harm else 'state'] in said


def test_an_experiment_is_shortened_where_its_schedule_allows():
  sections = {'checkpoint': {}, 'evaluate': {}, 'log': {}, 'optimizer': {'warmup_steps': 500}}
  given = {'steps': 10_000, **sections}
  c = resume.shortened(given, 8)
  assert (c['steps'], c['optimizer']['warmup_steps'], c['checkpoint']['every']) == (8, 4, 2)
  assert given['optimizer']['warmup_steps'] == 500
