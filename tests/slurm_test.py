"""launch/slurm.sh on a SLURM of this machine's own, with a command that takes no time."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests.launch_test import NASTY
from tests.programs import LAUNCH

PATH = f'{os.environ["PATH"]}:/usr/sbin:/sbin'
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/socket,cred_expire=5  # for so long a job is not begun again
StateSaveLocation={home}
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES
"""
# Says what it was given; leaves with 75 where its first argument asks for it.
PYTHON = """#!{python} -IS
import json, os, signal, sys, time
what, e = sys.argv[-1], os.environ
restart = e.get('SLURM_RESTART_COUNT', '0')
print(json.dumps(sys.argv[1:]), e['SLURM_PROCID'], e['SLURM_STEP_NUM_TASKS'], flush=True)
if what == 'once' and restart == '0':
  sys.exit(75)
if what == 'long' and restart == '0':
  signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), os._exit(75)))
  time.sleep(60)
sys.exit(int(what) if what.isdigit() else 0)
"""


def free_ports(n: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    servers = [stack.enter_context(socket.create_server(('', 0))) for _ in range(n)]
    return [s.getsockname()[1] for s in servers]


@pytest.fixture
def slurm(tmp_path):
  """The environment in which a SLURM of one node answers."""
  missing = [
    d for d in ('slurmctld', 'slurmd', 'munged', 'sbatch') if not shutil.which(d, path=PATH)
  ]
  if missing:
    pytest.skip(f'SLURM is not installed: no {", ".join(missing)}')
  home = tmp_path / 'slurm'
  home.mkdir(mode=0o755)
  (home / 'key').write_bytes(os.urandom(1024))
  (home / 'key').chmod(0o400)
  host = socket.gethostname().partition('.')[0]
  conf = CONF.format(host=host, home=home, ports=free_ports(2), user=pathlib.Path(home).owner())
  (home / 'slurm.conf').write_text(conf)
  files = [f'--{f}-file={home}/{f}' for f in ('key', 'pid', 'log', 'seed')]
  env = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM', 'SBATCH', 'SRUN'))}
  env |= {'SLURM_CONF': str(home / 'slurm.conf'), 'PATH': f'{tmp_path}:{PATH}'}
  with contextlib.ExitStack() as stack:

    def daemon(*command: str) -> None:
      with open(home / f'{command[0]}.out', 'w') as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
      stack.callback(process.wait)
      stack.callback(process.terminate)

    daemon('munged', '--foreground', '--force', f'--socket={home}/socket', *files)
    until(lambda: (home / 'socket').exists())
    daemon('slurmctld', '-D')
    daemon('slurmd', '-D')
    until(lambda: 'idle' in asked(env, 'sinfo', '--noheader', '--format=%T'))
    yield env
    asked(env, 'scancel', '--me', '--hurry')
    until(lambda: not asked(env, 'squeue', '--noheader'))


def asked(env: dict, *command: str) -> str:
  return subprocess.run(command, env=env, capture_output=True, text=True).stdout


def until(there) -> None:
  deadline = time.monotonic() + 40
  while not there():
    assert time.monotonic() < deadline, 'SLURM does not answer'
    time.sleep(0.1)


def test_slurm(slurm, tmp_path):
  python = tmp_path / 'python'
  python.write_text(PYTHON.format(python=sys.executable))
  python.chmod(0o755)
  (tmp_path / 'lines').write_text('python 1\npython "a  b" once\npython $((40+2)) >&2\npython 0')

  def submit(name: str, *arguments: str) -> subprocess.Popen:
    log = tmp_path / f'{name}.%a' if '--array' in arguments else tmp_path / name
    command = ['bash', LAUNCH / 'slurm.sh', f'--name={name}', f'--log={log}', *arguments]
    return subprocess.Popen(command, env=slurm, cwd=tmp_path, stdout=subprocess.DEVNULL)

  said = lambda name: (tmp_path / name).read_text() if (tmp_path / name).exists() else ''
  ids = lambda name: asked(slurm, 'squeue', '--noheader', f'--name={name}', '--format=%i').split()
  jobs = {
    'single': submit('single', '--', *NASTY, '0'),
    'mistake': submit('mistake', '--wait', '--', '2'),
    'pair': submit('pair', '--tasks_per_node=2', '--', '0'),
    'array': submit('array', '--array', 'lines', '--at_most=3'),
    'gives_up': submit('gives_up', '--wait', '--retries=0', '--', 'once'),
    'stopped': submit('stopped', '--', 'long'),
    'cancelled': submit('cancelled', '--', 'long'),
  }
  codes = {'mistake': 2, 'gives_up': 75}
  assert {name: job.wait(30) for name, job in jobs.items()} == {n: codes.get(n, 0) for n in jobs}

  (tmp_path / 'lines').write_text('')  # what is queued again has the line that it had

  # What SLURM does before a job's time is up, and what a user does.
  until(lambda: 'long' in said('stopped') and 'long' in said('cancelled'))
  asked(slurm, 'scancel', '--batch', '--signal=TERM', *ids('stopped'))
  asked(slurm, 'scancel', *ids('cancelled'))
  until(lambda: not asked(slurm, 'squeue', '--noheader'))

  line = lambda words, process=0, processes=1: f'{words} {process} {processes}'
  main = '["-m", "lmjax.main"'

  assert said('single').splitlines() == [line(json.dumps(['-m', 'lmjax.main', *NASTY, '0']))]
  pair = sorted(said('pair').splitlines())
  assert pair == [line(main + ', "0"]', 0, 2), line(main + ', "0"]', 1, 2)]
  assert said('array.1').splitlines()[0] == line('["1"]')
  assert [s for s in said('array.2').splitlines() if s[0] == '['] == [line('["a  b", "once"]')] * 2
  assert 'left with 75, queued again' in said('array.2')
  assert said('array.3').splitlines()[0] == line('["42"]')
  assert said('array.4').splitlines() == [line('["0"]')]
  assert said('gives_up').count('["-m"') == 1
  assert said('stopped').count('["-m"') == 2
  assert said('stopped').count('saved') == 1
  assert said('cancelled').count('["-m"') == 1
