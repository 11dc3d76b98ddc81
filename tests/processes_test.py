"""Several processes are one run: its numbers, its files, and what is said where one is missing."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from lmjax import evaluate, experiment, generate, processes, rollcall, sharding, train, workdir
from lmjax.data import loader
from lmjax.errors import ProcessLost, UserError
from tests import xla_flags
from tests.invariance_test import OBJECTIVES, SIZES, curve
from tests.train_test import as_file, lines

# Devices 0 to 3 are those of one process and 4 to 7 of the other: taken in turns, every group of
# them along the inner axis spans both processes, which then hold the same rows.
IN_TURNS = [0, 4, 1, 5, 2, 6, 3, 7]
CASES = {
  'fsdp': ('bert', {'data': 8}, range(8)),
  'tensor': ('clm', {'data': 2, 'model': 3}, IN_TURNS[:6]),
}
CHILD = """
import json, sys
from lmjax import config, processes
from tests.processes_test import look

port, index, job = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
processes.start(f'localhost:{port}', 2, index, {})
seen = look(job)
try:
  processes.check_same({'valid': 'abc', 'train': f'digest {index}'})
  raise AssertionError('a difference was not noticed')
except config.UserError as e:
  seen['difference'] = str(e)
if index == 0:
  with open(job['out'], 'w') as file:
    json.dump(seen, file)
processes.finish()
"""


def free_port() -> int:
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


def spawn(arguments: list[str], xla: str = xla_flags(4), **options) -> subprocess.Popen:
  """A process with four devices."""
  flags = {'XLA_FLAGS': xla, 'PYTHONPATH': os.getcwd()}
  command = [sys.executable, '-W', 'ignore', *arguments]
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  return subprocess.Popen(command, env=os.environ | flags, **pipes, **options)


def look(job: dict) -> dict:
  """What a job's experiments and a finished run show, in all processes together."""
  seen = {}
  for name, (c, devices) in job['experiments'].items():
    parts = experiment.prepare(c)
    # Adam turns the rounding of tiny gradients into updates, so that the fifth step is 2e-5 off.
    seen[name] = curve(parts, devices, steps=3).tolist()
    rows = parts.rows(sharding.make_mesh(c['sharding'], [jax.devices()[i] for i in devices]))
    data = loader.Loader(parts.examples('train'), c['batch'], c['seed'], rows)
    everyones = processes.collect(loader.fingerprint(data.batch(3), rows)) or [0]
    seen[f'hash of {name}'] = sum(everyones) % (1 << 64)
    seen[f'rows of {name}'] = processes.collect(rows.numbers.tolist())
  seen['evaluation'] = evaluate.run(job['finished'])
  parts, mesh = experiment.open_run(job['finished']), sharding.make_mesh()
  with jax.set_mesh(mesh), sharding.logical_axes(parts.config['sharding']['strategy']):
    _, params = evaluate.restore_params(parts, job['finished'], mesh)
    seen['text'] = generate.continue_text(parts, params, 'The', 8, temperature=0)
  return seen


@pytest.fixture(scope='module')
def straight(tiny, tmp_path_factory) -> tuple[pathlib.Path, dict]:
  """A run of one process with eight devices, and its config."""
  workdir = tmp_path_factory.mktemp('straight') / 'run'
  rate = {'optimizer.name': 'sgd', 'optimizer.lr': 0.1, 'checkpoint.keep_last': 100}
  c = tiny('clm', steps=60, **rate, **{'sharding.strategy': 'fsdp', 'evaluate.every': 30})
  train.run(c, str(workdir))
  return workdir, c


def test_two_processes_compute_what_one_device_does(tiny, tmp_path, straight):
  job = {'experiments': {}, 'finished': str(straight[0]), 'out': str(tmp_path / 'seen.json')}
  alone = {**job, 'experiments': {}}
  for strategy, (objective, sizes, devices) in CASES.items():
    name, own = OBJECTIVES[objective]
    mesh = {f'sharding.{axis}': sizes.get(axis, 1) for axis in sharding.MESH_AXES}
    c = tiny(name, **own, **SIZES, **mesh, **{'sharding.strategy': strategy})
    job['experiments'][strategy] = c, list(devices)
    alone['experiments'][objective] = tiny(name, **own, **SIZES), [0]
  port = str(free_port())
  pair = [spawn(['-c', CHILD, port, str(i), json.dumps(job)]) for i in range(2)]
  expected = look(alone)
  errors = [process.communicate(timeout=600)[1] for process in pair]
  assert [process.returncode for process in pair] == [0, 0], errors
  got = json.loads(pathlib.Path(job['out']).read_text())
  for strategy, (objective, _, devices) in CASES.items():
    assert len(got[strategy]) == 3
    np.testing.assert_allclose(got[strategy], expected[objective], rtol=1e-5, err_msg=strategy)
    assert got[f'hash of {strategy}'] == expected[f'hash of {objective}']
    share = 12 if devices == range(8) else 24
    assert list(map(len, got[f'rows of {strategy}'])) == [share, share]
  assert got['evaluation'] == pytest.approx(expected['evaluation'], rel=1e-5)
  assert got['text'] == expected['text']
  host = socket.gethostname()
  assert got['difference'] == (
    f"process 1 ({host}) differs from process 0 ({host}): train is 'digest 1', not 'digest 0'"
  )


def test_a_killed_process_ends_the_other_and_one_process_goes_on(tmp_path, straight):
  finished, c = straight
  broken = tmp_path / 'broken'
  command = ['-m', 'lmjax.main', as_file(c, tmp_path), '--workdir', str(broken)]
  command += ['--coordinator', f'localhost:{free_port()}', '--processes', '2', '--process']
  pair = [spawn([*command, str(i)]) for i in range(2)]
  while not (broken / 'checkpoints' / '6').exists():
    assert [process.poll() for process in pair] == [None, None], pair[0].communicate()
    time.sleep(0.01)
  pair[1].send_signal(signal.SIGKILL)
  began = time.monotonic()
  out, errors = pair[0].communicate(timeout=60)
  assert time.monotonic() - began < 20
  assert pair[0].returncode == 75, errors
  who = f'process 1 ({socket.gethostname()})'
  assert errors.strip().splitlines()[-1] == f'lmjax: {who} has ended without a word'
  assert 'step 3/60' in out
  assert pair[1].communicate()[0] == ''
  assert 6 <= len(lines(broken, 'ledger')) < 60
  train.run(c, str(broken))
  assert lines(finished, 'ledger') == lines(broken, 'ledger')
  losses = [
    [(x['step'], x['train/loss']) for x in lines(run, 'metrics') if 'train/loss' in x]
    for run in (finished, broken)
  ]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  records = [json.loads((run / 'record.json').read_text()) for run in (finished, broken)]
  assert records[0]['machine'] == {**records[1]['machine'], 'processes': 1}
  (restart,) = records[1]['restarts']
  assert restart['changed']['machine.processes'] == [2, 1]


CRASHING = """
import sys, time
from lmjax import processes

processes.start(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]), {})
try:
  if sys.argv[2] == '1':
    raise RuntimeError('a fault of this machine')
  time.sleep(100)
except RuntimeError as e:
  processes.fail(1, e)
"""


def test_a_process_that_crashes_ends_the_other_with_its_traceback():
  """The other may be started again: there is no bug in what it did."""
  port = str(free_port())
  pair = [spawn(['-c', CRASHING, port, index]) for index in '01']
  said = [process.communicate(timeout=60)[1] for process in pair]
  assert [process.returncode for process in pair] == [75, 1], said
  who = f'lmjax: process 1 ({socket.gethostname()}) stopped: Traceback (most recent call last):'
  assert who in said[0]
  assert said[0].endswith('RuntimeError: a fault of this machine\n')


def test_what_one_process_lacks_is_said_by_both(tiny, tmp_path, corpus):
  """A relative path, and process 1 in a directory without it."""
  text = (corpus / 'train.txt').read_text()
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
  (tmp_path / 'a' / 'text.txt').write_text(text)
  c = tiny('clm', **{'data.train': 'text.txt'})
  command = ['-m', 'lmjax.main', as_file(c, tmp_path), '--workdir', str(tmp_path / 'run')]
  command += ['--coordinator', f'localhost:{free_port()}', '--processes', '2', '--process']
  environment = os.environ | {'PYTHONPATH': os.getcwd(), 'MALLOC_ARENA_MAX': '1'}
  pair = [
    subprocess.Popen(
      [sys.executable, '-W', 'ignore', *command, str(i)],
      cwd=tmp_path / name,
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i, name in enumerate('ab')
  ]
  said = [process.communicate(timeout=100)[1].strip() for process in pair]
  assert [process.returncode for process in pair] == [2, 2], said
  assert said[1].startswith('lmjax: ')
  assert 'text.txt' in said[1]
  who = f'process 1 ({socket.gethostname()})'
  assert said[0] == f'lmjax: {who} stopped: {said[1].removeprefix("lmjax: ")}'
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_workdir_that_process_0_does_not_see_is_refused(tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(processes, 'index', lambda: 1)  # which does not write
  with pytest.raises(UserError, match='all hosts need one workdir together'):
    workdir.check(epath.Path(tmp_path), tiny('clm'))


# ------------------------------------------------------------------------------- the roll call


def call(port: int, *hellos: dict, seconds: float = 2.0) -> list:
  """What each process gets or raises; those of one number come one after the other."""

  def one(hello):
    time.sleep(hello.pop('late', 0))
    hello = {'processes': 2, 'host': f'host{hello["process"]}', 'about': {}, **hello}
    meet = rollcall.answer if hello['process'] else rollcall.hold
    try:
      hosts, ends = meet(f'localhost:{port}', hello, seconds)
    except (UserError, ProcessLost) as e:
      return type(e), str(e)
    for end in ends.values():
      end.close()
    return hosts, sorted(ends)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(one, hellos))


def test_all_come_in_any_order():
  hosts = ['host0', 'host1', 'host2']
  numbers = [{'process': i, 'processes': 3} for i in (2, 0, 1)]
  numbers[1]['late'] = 0.5
  assert call(free_port(), *numbers) == [(hosts, [0]), (hosts, [1, 2]), (hosts, [0])]


MISFITS = {
  'missing': (
    [{'process': 0, 'processes': 4}, {'process': 2, 'processes': 4}],
    ProcessLost,
    'processes 1, 3 of 4 did not come to localhost:{port} within 2 s; there came process 0 '
    '(host0), process 2 (host2)',
  ),
  'two of one number': (
    [{'process': 0, 'processes': 3}, *[{'process': 1, 'processes': 3}] * 2],
    UserError,
    'two were started as process 1: on host1 and host1',
  ),
  'other counts': (
    [{'process': 0}, {'process': 1, 'processes': 3}],
    UserError,
    'process 1 (host1) was started as one of 3, process 0 (host0) of 2',
  ),
  'other config': (
    [
      {'process': 0, 'about': {'config.steps': 5, 'versions.jax': '1'}},
      {'process': 1, 'about': {'config.steps': 6, 'versions.jax': '1'}},
    ],
    UserError,
    'process 1 (host1) differs from process 0 (host0): config.steps is 6, not 5',
  ),
}


@pytest.mark.parametrize('name', MISFITS)
def test_all_that_came_hear_what_is_wrong(name):
  hellos, kind, said = MISFITS[name]
  port = free_port()
  got = call(port, *map(dict, hellos))
  assert got == [(kind, said.format(port=port))] * len(hellos)


def test_process_0_is_missing():
  port = free_port()
  (got,) = call(port, {'process': 1}, seconds=0.5)
  said = f'process 0 did not come to localhost:{port} within 0.5 s: Connection refused'
  assert got == (ProcessLost, said)
  assert ProcessLost.exit_code == 75


def test_a_stranger_and_a_process_that_was_started_again_do_no_harm():
  port = free_port()

  def knock(text):
    while True:
      try:
        with socket.create_connection(('localhost', port)) as caller:
          return caller.sendall(text)
      except ConnectionRefusedError:
        time.sleep(0.01)

  before = {'process': 1, 'processes': 3, 'host': 'before', 'about': {}}
  with contextlib.ExitStack() as stack:
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor())
    first = pool.submit(call, port, {'process': 0, 'processes': 3})
    knock(b'GET / HTTP/1.0\r\n\r\n')
    for _ in range(4):
      stack.enter_context(socket.create_connection(('localhost', port)))  # and says nothing
    knock(json.dumps(before).encode() + b'\n')
    # The others come when it has hung up: together with it they would be all.
    others = call(port, *({'process': i, 'processes': 3} for i in (1, 2)))
    assert [hosts for hosts, _ in first.result() + others] == [['host0', 'host1', 'host2']] * 3


def test_a_port_that_is_taken_is_a_sentence():
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
    (got,) = call(port, {'process': 0})
  assert got[0] is UserError
  assert f'cannot listen at port {port}' in got[1]


# ------------------------------------------------------------------------------- SLURM and pods

STEP = {'SLURM_JOB_ID': '77', 'SLURM_PROCID': '1', 'SLURM_LOCALID': '0', 'SLURM_NTASKS': '8'}
TASK = {**STEP, 'SLURM_STEP_NODELIST': 'node[007-008]'}
ADDRESS = f'node007:{77 + 65536 - 4096}'
CLUSTERS = {
  'a laptop': ({}, False, None),
  'a batch script': (STEP, False, None),
  'a shell in an allocation': ({**TASK, 'SLURM_STEP_NUM_TASKS': '1'}, False, None),
  'tasks': ({**TASK, 'SLURM_STEP_NUM_TASKS': '8'}, False, (ADDRESS, 8, 1)),
  'a notebook with a TPU': ({'TPU_WORKER_HOSTNAMES': 'localhost'}, True, None),
  'the CPU of a host of a pod': ({'JAX_PLATFORMS': 'cpu'}, True, None),
  'a pod': (
    {
      'TPU_WORKER_HOSTNAMES': '127.0.0.1,127.0.0.2',
      'TPU_WORKER_ID': '1',
      'MEGASCALE_NUM_SLICES': '2',
      'MEGASCALE_SLICE_ID': '1',
      'MEGASCALE_COORDINATOR_ADDRESS': '127.0.0.1',
    },
    True,
    ('127.0.0.1:8482', 4, 3),
  ),
}


@pytest.mark.parametrize('name', CLUSTERS)
def test_clusters(monkeypatch, name):
  variables, tpu, expected = CLUSTERS[name]
  for key in os.environ:
    if key.startswith(('SLURM', 'TPU', 'JAX_PLATFORMS')):
      monkeypatch.delenv(key)
  for key, value in variables.items():
    monkeypatch.setenv(key, value)
  module = sys.modules['jax._src.clusters.cloud_tpu_cluster']
  monkeypatch.setattr(module, 'running_in_cloud_tpu_vm', tpu)
  monkeypatch.setattr(module, 'get_metadata', lambda key: pytest.fail('asked the network'))
  assert processes.cluster() == expected
