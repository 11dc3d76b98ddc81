"""The launch scripts when something fails: what is tried again, and what stays behind."""

import os
import signal
import subprocess
import time

import pytest

from tests.launch_test import LOCAL2, NEW, TPU
from tests.programs import World


@pytest.fixture
def world(tmp_path) -> World:
  return World(tmp_path)


def begun(world: World, script: str, *arguments: str, **env: str) -> subprocess.Popen:
  """A script whose output goes into the file `said`."""
  with open(world.home / 'said', 'a') as said:
    out = {'stdout': said, 'stderr': subprocess.STDOUT, 'stdin': subprocess.DEVNULL}
    return subprocess.Popen(
      world.command(script, *arguments),
      env=world.env | env,
      cwd=world.home,
      start_new_session=True,
      **out,
    )


def wait_for(world: World, text: str, times: int = 1) -> None:
  deadline = time.monotonic() + 20
  while (said := (world.home / 'said').read_text()).count(text) < times:
    assert time.monotonic() < deadline, said
    time.sleep(0.02)


# -------------------------------------------------------------------------------------- one machine


@pytest.mark.parametrize(
  ('options', 'plan', 'code', 'calls'),
  [
    ([], {'python': [75, 75, 0]}, 0, 3),
    (['--retries=1'], {'python': [75, 75, 0]}, 75, 2),
    (['--retries=1', '--steady=1'], {'python': [1075, 1075, 0]}, 0, 3),
    *[([], {'python': [code, 0]}, code, 1) for code in (1, 2, 70, 74, 130)],
    # Of several, the bug of one is not what the others say of it; one that was killed is.
    (LOCAL2, {'python0': [75, 0], 'python1': [1, 0]}, 1, 2),
    (LOCAL2, {'python0': [1075, 0], 'python1': ['kill', 0]}, 0, 4),
    (LOCAL2, {'python0': [2], 'python1': [2]}, 2, 2),
    # One that does not end by itself.
    ([*LOCAL2, '--grace=0'], {'python0': [2], 'python1': ['wait']}, 2, 2),
    ([*LOCAL2, '--grace=1'], {'python0': [0], 'python1': ['deaf']}, 137, 2),
  ],
)
def test_local_runs_are_started_again(world, options, plan, code, calls):
  world.plan(**plan)
  began = time.monotonic()
  done = world.call('local', '--pause=0', *options, '--', 'a')
  assert (done.returncode, len(world.calls())) == (code, calls), done.stderr
  assert time.monotonic() - began < 15
  assert done.stderr.count('starts again') == calls // (2 if LOCAL2[0] in options else 1) - 1


def test_local_runs_are_told_to_stop(world):
  world.plan(python0=['wait', 0], python1=['wait', 0])
  script = begun(world, 'local', '--pause=0', *LOCAL2, '--', 'a')
  wait_for(world, 'waits', times=2)
  assert sorted((world.home / 'said').read_text().splitlines()) == ['[0] waits', '[1] waits']
  script.terminate()
  assert script.wait(20) == 75
  assert len(world.calls()) == 2
  assert 'starts again' not in (world.home / 'said').read_text()


def test_a_pause_is_ended_by_a_signal(world):
  world.plan(python=[75, 0])
  script = begun(world, 'local', '--pause=60', '--', 'a')
  wait_for(world, 'starts again in 60 s (1 of 3)')
  script.terminate()
  assert script.wait(20) == 75
  assert len(world.calls()) == 1


# ------------------------------------------------------------------------------------------ TPU VMs

WHOLE = 'create scp ssh ssh delete'


@pytest.mark.parametrize(
  ('options', 'plan', 'code', 'verbs'),
  [
    (NEW, {}, 0, WHOLE),
    ([*NEW, '--keep'], {}, 0, 'create scp ssh ssh'),
    (NEW, {'create': [1, 1, 0], 'describe': ['', '', '', 'ACTIVE']}, 0, f'create create {WHOLE}'),
    (NEW, {'create': [1], 'describe': ['', 'CREATING', 'ACTIVE']}, 0, WHOLE),
    (NEW, {'create': [2], 'describe': ['']}, 2, 'create'),
    (NEW, {'ssh': [0, 75, 0]}, 0, 'create scp ssh ssh ssh delete'),
    ([*NEW, '--retries=1'], {'ssh': [0, 75, 75]}, 75, 'create scp ssh ssh ssh delete'),
    ([*NEW, '--retries=0', '--steady=1'], {'ssh': [0, 1075, 75]}, 75, 'create scp ssh ssh delete'),
    (
      [*NEW, '--retries=1', '--steady=1'],
      {'ssh': [0, 1075, 1075, 0]},
      0,
      'create scp ssh ssh ssh ssh delete',
    ),
    *[(NEW, {'ssh': [0, code]}, code, WHOLE) for code in (2, 70, 74, 137)],
    *[([*NEW, '--spot'], {'ssh': [0, n, 0]}, 0, f'{WHOLE[:-7]} ssh delete') for n in (137, 143)],
    (
      [*NEW, '--spot', '--retries=1', '--steady=1'],
      {'ssh': [0, 1137, 1137]},
      137,
      'create scp ssh ssh ssh delete',
    ),
    (NEW, {'ssh': [0, 101]}, 1, WHOLE),
    (NEW, {'ssh': [1, 0]}, 0, 'create scp ssh scp ssh ssh delete'),
    (NEW, {'ssh': [0, 255, 0]}, 0, 'create scp ssh ssh ssh delete'),
    # Taken away in the middle.
    (
      [*NEW, '--spot'],
      {'ssh': [0, 255, 0], 'describe': ['', 'ACTIVE', 'SUSPENDED', 'PROVISIONING', 'ACTIVE']},
      0,
      f'{WHOLE} {WHOLE}',
    ),
    (NEW, {'ssh': [0, 255], 'describe': ['', 'ACTIVE', 'SUSPENDED']}, 75, WHOLE),
    ([*NEW, '--retries=1'], {'describe': ['', 'FAILED']}, 75, 'create delete'),
    # Waiting is no running.
    (
      [*NEW, '--spot', '--retries=1', '--steady=1', '--poll=1'],
      {'describe': ['', *(['CREATING', 'FAILED', 'FAILED'] * 3)]},
      75,
      'create delete create delete',
    ),
    ([*NEW, '--retries=0'], {'describe': ['']}, 75, 'create delete'),
    ([*TPU, '--existing'], {'ssh': [0, 75, 0]}, 0, 'scp ssh ssh ssh'),
    ([*TPU, '--existing'], {'ssh': [0, 2]}, 2, 'scp ssh ssh'),
  ],
)
def test_tpus_are_asked_for_again_and_given_back(world, options, plan, code, verbs):
  world.plan(**{'describe': ['', 'WAITING_FOR_RESOURCES', 'ACTIVE'], **plan})
  done = world.call('tpu_vm', *options, '--', 'a')
  assert (done.returncode, ' '.join(world.verbs())) == (code, verbs), done.stderr


def test_a_tpu_that_could_not_be_deleted_is_said(world):
  world.plan(describe=['', 'ACTIVE'], delete=[1])
  done = world.call('tpu_vm', *NEW, '--', 'a')
  assert 'a may still be there, and cost' in done.stderr


def test_a_signal_gives_the_tpu_back(world):
  world.plan(describe=['', 'ACTIVE'], ssh=[0, 'wait'])
  script = begun(world, 'tpu_vm', *NEW, '--', 'a')
  wait_for(world, 'waits')
  script.send_signal(signal.SIGINT)
  assert script.wait(20) == 130
  assert world.verbs() == WHOLE.split()
  pid = world.calls('gcloud')[-2][4]  # the last but the one that deletes
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_a_run_on_a_tpu_outlives_its_connection(world):
  home = {'HOME': str(world.home / 'host0')}
  code, log = (world.home / 'host0' / '.lmjax' / 'source', world.home / 'host0' / '.lmjax' / 'log')
  (code / 'lmjax').mkdir(parents=True)
  world.plan(python=['wait', 0])
  first = begun(world, 'tpu_vm_host', 'run', 'python', 'a  b', **home)
  wait_for(world, 'waits')
  os.killpg(first.pid, signal.SIGKILL)
  first.wait()
  other = world.call('tpu_vm_host', 'run', 'python', 'a b', **home)
  assert (other.returncode, other.stderr) == (
    2,
    'another command is at work here: python a\\ \\ b \n',
  )
  assert world.call('tpu_vm_host', 'install', 'exit 1', **home).returncode == 0
  assert (code / 'lmjax').exists()
  again = begun(world, 'tpu_vm_host', 'run', 'python', 'a  b', **home)
  time.sleep(0.5)
  lock = world.home / 'host0' / '.lmjax' / 'lock'
  assert subprocess.run(['flock', '-n', lock, 'true']).returncode == 1
  (pid,) = pids(world, 'a  b')
  os.kill(pid, signal.SIGTERM)
  assert again.wait(20) == 75
  assert log.read_text() == 'waits\n'
  assert len(world.calls('python')) == 1
  assert world.call('tpu_vm_host', 'run', 'python', 'a  b', **home).returncode == 0
  world.plan(python=[1])
  assert world.call('tpu_vm_host', 'run', 'python', 'a  b', **home).returncode == 101


def pids(world: World, argument: str) -> list[int]:
  """The fake Pythons that were given this."""
  return [c[4] for c in world.calls('python') if argument in c[1]]


# -------------------------------------------------------------------------------------------- SLURM


@pytest.mark.parametrize(
  ('code', 'state', 'env', 'again'),
  [
    (75, 'RUNNING', {}, ['requeue', '7']),
    (75, 'RUNNING', {'RETRIES': '0'}, None),
    (75, 'RUNNING', {'SLURM_ARRAY_JOB_ID': '7', 'SLURM_ARRAY_TASK_ID': '3'}, ['requeue', '7_3']),
    (75, 'RUNNING', {'SLURM_RESTART_COUNT': '1'}, ['requeue', '7']),
    (75, 'RUNNING', {'SLURM_RESTART_COUNT': '2'}, None),
    (75, 'CANCELLED', {}, None),
    (0, 'RUNNING', {}, None),
    (2, 'RUNNING', {}, None),
  ],
)
def test_a_job_is_queued_again(world, code, state, env, again):
  world.plan(srun=[code], squeue=[state])
  done = world.call('slurm_job', env.get('RETRIES', '2'), 'python', 'a', SLURM_JOB_ID='7', **env)
  assert done.returncode == code
  assert [c[1] for c in world.calls('scontrol')] == ([again] if again else [])


def test_a_job_whose_time_is_up_is_told_and_queued_again(world):
  world.plan(srun=['wait'], squeue=['RUNNING'])
  script = begun(world, 'slurm_job', '0', 'python', 'a', SLURM_JOB_ID='7')
  wait_for(world, 'waits')
  for times in (1, 2):
    time.sleep(0.5)  # until it waits again
    script.terminate()
    deadline = time.monotonic() + 20
    while len(world.calls('scancel')) < times and time.monotonic() < deadline:
      time.sleep(0.02)
  assert [c[1] for c in world.calls('scancel')] == [['--signal=TERM', '7']] * 2
  os.kill(world.calls('srun')[0][4], signal.SIGTERM)  # as scancel would
  assert script.wait(20) == 75
  assert [c[1] for c in world.calls('scontrol')] == [['requeue', '7']]
