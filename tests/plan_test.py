"""Plans: of shipped experiments, of what does not fit, of sweeps; and the command line."""

import json
import math
import subprocess
import sys

import jax
import pytest

from lmjax import config, plan
from lmjax.errors import UserError
from lmjax.plan import __main__ as plan_main
from lmjax.plan import search as search_lib

SMALL = {'model.depth': 2, 'model.dim': 256, 'model.heads': 4, 'tokenizer.vocab_size': 1024}
ADAMW = {'optimizer.name': 'adamw', 'optimizer.args': {}}  # which has no products
KEYS = (
  'config topology fits parameters memory_gib model_tflop dot_tflop hbm_gib wire_gib step_seconds '
  'bound_by tokens_per_second mfu hours price compile_seconds'
).split()


@pytest.fixture
def job(tmp_path):
  """job(spec, topology, **overrides), with a cache of its own."""

  def make(spec, topology, price=None, **overrides):
    cache = {'cache': str(tmp_path / 'cache')}
    meant = config.declared(spec, 'TOPOLOGIES', {}).get(topology, {})
    return plan.Job(spec, meant | cache | overrides, topology, price)

  return make


@pytest.mark.parametrize(
  ('spec', 'topology', 'overrides'),
  [
    ('experiments/quickstart.py', 'cpu:2', SMALL | ADAMW | {'length': 32, 'batch': 4}),
    ('experiments/gpt2.py:small', 'v5e:4x4', SMALL | {'length': 128, 'batch': 32}),
    (
      'experiments/gpt2.py:small',
      'v5e:2x2@2',
      SMALL | {'length': 128, 'batch': 32, 'model.attention': 'splash'},
    ),
    ('experiments/bert.py:base', 'v5e:4x4', SMALL | {'length': 128, 'batch': 32}),
  ],
)
def test_a_plan_has_its_numbers(job, spec, topology, overrides):
  if topology[0] == 'v':
    pytest.importorskip('libtpu')
  entry = plan.plan(job(spec, topology, price=2.0, **overrides))
  assert set(KEYS) <= set(entry)
  memory = entry['memory_gib']
  assert entry['fits']
  assert memory['arguments'] + memory['temporaries'] <= memory['peak'] * 1.001 < memory['capacity']
  assert 0.9 < entry['recomputation'] < 1.6
  busy = entry['busy_seconds']
  assert entry['step_seconds'] == max(busy.values()) == busy[entry['bound_by']]
  assert 0 < entry['mfu'] < 1
  assert entry['wire_gib'].keys() <= {
    'all-gather',
    'all-reduce',
    'reduce-scatter',
    'all-to-all',
    'collective-permute',
  }
  assert sum(entry['wire_gib'].values()) == pytest.approx(sum(entry['wire_gib_by_axis'].values()))
  c = config.resolve(config.load(spec, overrides))
  rate = c['batch'] * c['length'] / entry['step_seconds']
  assert entry['tokens_per_second'] == pytest.approx(rate)
  assert entry['hours'] == pytest.approx(c['steps'] * entry['step_seconds'] / 3600)
  chips = {'cpu:2': 2, 'v5e:4x4': 16, 'v5e:2x2@2': 8}[topology]
  assert entry['price'] == pytest.approx(2.0 * chips * entry['hours'])
  shrinks = {array['array']: array['shrinks'] for array in entry['largest']}
  if topology == 'cpu:2':  # where parameters and the optimizer's averages are whole
    assert shrinks['f32[2, 1024, 256]'] == 'sharding.strategy'
  if topology == 'v5e:4x4' and 'gpt2' in spec:  # of 256 x 256 or 1024 dims, over four and four
    assert shrinks['f32[2, 256, 64]'] == 'sharding.data'
  assert ('@' in topology) == (entry['busy_seconds']['network'] > 0)


def test_what_has_no_room_says_how_much_it_needs(job):
  """A small model with very many rows: its activations need more than there is."""
  pytest.importorskip('libtpu')
  much = SMALL | {'length': 128, 'batch': 1 << 16, 'model.remat': 'none'}
  much |= {'sharding.data': -1, 'sharding.model': 1}
  entry = plan.plan(job('experiments/gpt2.py:small', 'v5e:2x2', **much))
  memory = entry['memory_gib']
  assert not entry['fits']
  assert memory['peak'] > memory['temporaries'] > memory['capacity'] == 15.75
  assert memory['evaluation'] is None
  assert entry['step_seconds'] is entry['price'] is None
  assert set(KEYS) <= set(entry)
  sizes = [array['gib'] for array in entry['largest']]
  assert sizes == sorted(sizes, reverse=True)
  assert sizes[0] > 1
  assert {array['shrinks'] for array in entry['largest']} == {'model.remat'}
  assert 'ffn/up' in ' '.join(array['where'] for array in entry['largest'])


# What a block keeps for a row, in GiB, and how slow it is.
KEPT = {'none': (10, 1.0), 'dots': (5, 1.1), 'dots_no_batch': (3, 1.15), 'attended': (2.5, 1.16)}
KEPT |= {'projections': (2, 1.2), 'full': (0.5, 1.3)}


@pytest.mark.parametrize(
  ('topology', 'batch', 'room'),
  [('cpu:1', 30, room) for room in (400, 170, 100, 60, 20, 9, 6, 2, 0.3)]
  + [('cpu:8', 72, room) for room in (400, 50, 20, 4)],  # which 2, 4 and 6 do not divide
)
def test_the_fastest_that_fits_is_found(job, monkeypatch, topology, batch, room):
  """Of programs whose memory and time are known by heart, beside all that could be asked for."""
  asked = job('experiments/shakespeare_char.py:cpu', topology, batch=batch)
  counts = [n for n in range(1, batch + 1) if batch % (n * int(topology[-1])) == 0]

  def pretend(job):
    c = config.resolve(config.load(job.spec, job.overrides))
    assert c['micro_batches'] in counts
    each, slow = KEPT[c['model']['remat']]
    temporaries = each * c['batch'] / c['micro_batches']
    arguments, slower = {'replicate': (5, 0), 'zero': (2, 0.02), 'fsdp': (0.6, 0.1)}[
      c['sharding']['strategy']
    ]
    peak = arguments + temporaries
    memory = {'arguments': arguments, 'temporaries': temporaries, 'peak': peak, 'capacity': room}
    fits = peak <= room
    seconds = slow + slower + 0.04 * c['micro_batches']
    return {'fits': fits, 'memory_gib': memory, 'step_seconds': seconds if fits else math.inf}

  monkeypatch.setattr(search_lib, 'plan', pretend)
  axes = {'model.remat': KEPT, 'micro_batches': counts}
  arms = config.product({'sharding.strategy': ['replicate', 'zero', 'fsdp']}, axes)
  best = min((pretend(asked.but(arm)) for arm in arms), key=lambda entry: entry['step_seconds'])
  found = search_lib.search(asked)
  if not best['fits']:
    assert found is None
    return
  overrides, entry = found
  assert entry == best == pretend(asked.but(overrides))


def test_arms_of_one_program_are_compiled_once(job, monkeypatch):
  """Learning rates, seeds and data make no other program; a width does."""
  compiled = []
  compile_ = jax.stages.Lowered.compile
  monkeypatch.setattr(
    jax.stages.Lowered,
    'compile',
    lambda self, **options: compiled.append(self) or compile_(self, **options),
  )
  sweep = config.product(
    {'model.ffn_dim': [256, 512], 'optimizer.lr': [1e-3, 3e-3], 'seed': [0, 1]}
  )
  small = SMALL | ADAMW | {'batch': 4, 'length': 32}
  entries = [plan.plan(job('experiments/quickstart.py', 'cpu:1', **small, **arm)) for arm in sweep]
  assert len(entries) == 8
  assert len(compiled) == 2 * 2  # to train and to evaluate
  assert len({entry['parameters'] for entry in entries}) == 2


def test_jobs(tmp_path):
  specs = ['experiments/gpt2.py:small', 'experiments/quickstart.py']
  found = list(plan.jobs(specs, [], {'steps': '7'}, sweep=False, price=None))
  assert {job.topology for job in found} >= {'v5e:4x4', 'cpu:1'}
  assert found[0].overrides == {'sharding.data': 4, 'sharding.model': 4, 'steps': '7'}
  assert found[0].command.startswith('experiments/gpt2.py:small --config.sharding.data=4 ')
  arms = list(plan.jobs(['experiments/ablations/mask_rate.py'], ['cpu:2'], {}, True, None))
  assert len(arms) == len(config.arms('experiments/ablations/mask_rate.py'))
  wrong = tmp_path / 'y.py'
  wrong.write_text('TOPOLOGIES = ("cpu:1",)\n')
  with pytest.raises(UserError, match='TOPOLOGIES of'):
    list(plan.jobs([str(wrong)], [], {}, False, None))
  nowhere = tmp_path / 'x.py'
  nowhere.write_text('from lmjax import config\nget_config = config.base\n')
  with pytest.raises(UserError, match='say where with --topology'):
    list(plan.jobs([str(nowhere)], [], {}, False, None))
  with pytest.raises(UserError, match='has no sweep'):
    list(plan.jobs(specs, ['cpu:1'], {}, True, None))


def command(*args, code=0):
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-m', 'lmjax.plan', *args],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == code, done.stderr
  return done


def test_the_command_prints_a_table_and_writes_json(tmp_path):
  out = tmp_path / 'plan.json'
  done = command(
    *('--config=experiments/quickstart.py', '--topology=cpu:1', '--topology=cpu:2'),
    *(f'--json={out}', '--price_per_chip_hour=0.5', f'--config.cache={tmp_path}'),
    *('--config.model.depth=1', '--config.batch=4', '--config.length=32'),
  )
  entries = json.loads(out.read_text())
  assert [entry['topology'] for entry in entries] == ['cpu:1', 'cpu:2']
  for entry in entries:
    assert f'{entry["config"]}  on  {entry["topology"]}' in done.stdout
    assert f'{entry["tokens_per_second"]:,.0f}' in done.stdout


def test_mistakes_of_any_arm_are_said_before_anything_is_compiled(tmp_path):
  """That no kernel runs on a CPU is found with the model."""
  sweep = tmp_path / 'arms.py'
  sweep.write_text(
    'from experiments.quickstart import *\n'
    'def sweep():\n'
    '  return [{"model.attention": x} for x in ("auto", "splash", "reference")]\n'
  )
  done = command(f'--config={sweep}', '--sweep', '--topology=cpu:1', code=2)
  assert 'model.attention = "splash" cannot be' in done.stderr
  assert 'compiling' not in done.stderr


def test_one_that_cannot_be_compiled_does_not_lose_the_others(job, monkeypatch, capsys):
  def pretend(job):
    if job.topology == 'v5p:2x2x1':
      raise UserError('the compiler gives up')
    return {'fits': True, 'topology': job.topology}

  monkeypatch.setattr(plan_main, 'plan', pretend)
  todo = [job('experiments/quickstart.py', where) for where in ('cpu:1', 'v5p:2x2x1', 'cpu:2')]
  entries, errors = plan_main.planned(todo, measured=False)
  assert [entry['topology'] for entry in entries] == ['cpu:1', 'cpu:2']
  assert len(errors) == 1
  assert 'is not planned for v5p:2x2x1: the compiler gives up' in capsys.readouterr().err


def test_measured_beside_predicted(tmp_path):
  out = tmp_path / 'plan.json'
  small = ('--config.model.depth=1', '--config.batch', '8', '--config.length=32')
  args = ('--config=experiments/quickstart.py', '--measure', f'--json={out}', *small)
  done = command(*args, f'--config.cache={tmp_path}')
  (entry,) = json.loads(out.read_text())
  seen = entry['measured']
  assert 0 < entry['step_seconds'] < 100 * seen['step_seconds']
  assert seen['tokens_per_second'] == pytest.approx(8 * 32 / seen['step_seconds'])
  assert 'measured: ' in done.stdout


@pytest.mark.parametrize(
  ('args', 'said'),
  [
    ([], 'name an experiment'),
    (['--config=experiments/none.py'], 'there is no config file'),
    (['--config=experiments/quickstart.py', '--topology=v9:4x4'], 'there is no hardware "v9"'),
    (['--config=experiments/quickstart.py', '--config.stepz=4'], 'did you mean "steps"'),
    (['--config=experiments/quickstart.py', '--topologie=cpu:1'], 'topologie'),
    (['--config=experiments/quickstart.py', '--json=/nowhere/x.json'], 'no directory /nowhere'),
    (['--config=experiments/quickstart.py', '--topology=here'], 'with --measure'),
    (['--config=experiments/quickstart.py', '--json=/'], '--json=/ is a directory'),
    (['--config=experiments/quickstart.py', '--price_per_chip_hour=-1'], 'price_per_chip_hour'),
    (
      [
        *('--config=experiments/quickstart.py', '--topology=cpu:5', '--config.batch=10'),
        '--config.sharding.strategy=fsdp',
      ],
      'its dimension "embed" of 192 does not divide over 5 devices',
    ),
    (
      ['--config=experiments/quickstart.py', '--topology=cpu:3', '--config.sharding.data=3'],
      'batch = 16 does not divide',
    ),
  ],
)
def test_mistakes_are_sentences(args, said):
  done = command(*args, code=2)
  assert said in done.stderr
  assert 'Traceback' not in done.stderr
