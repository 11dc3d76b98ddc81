"""Programs that stand for gcloud, sbatch and all others that the launch scripts call."""

import json
import os
import pathlib
import subprocess
import sys

LAUNCH = pathlib.Path(__file__).parent.parent / 'launch'
# Stands for every program that the scripts call.  What it is to do it takes from plan.json, from
# which it removes what was done; gcloud has two hosts, whose homes are directories.
FAKE = r"""#!{python} -IS
import fcntl, json, os, pathlib, shutil, signal, subprocess, sys, time
name, argv, home = pathlib.Path(sys.argv[0]).name, sys.argv[1:], pathlib.Path({home!r})
stdin = sys.stdin.read() if name == 'kubectl' else ''
devices = ('XLA_FLAGS', 'JAX_PLATFORMS', 'CUDA_VISIBLE_DEVICES')
seen = {{k: os.environ[k] for k in devices if k in os.environ}}
with open(home / 'lock', 'w') as lock:
  fcntl.flock(lock, fcntl.LOCK_EX)
  with open(home / 'calls.jsonl', 'a') as file:
    print(json.dumps([name, argv, stdin, seen, os.getpid()]), file=file)
  plan = json.loads((home / 'plan.json').read_text())
  verb = next((v for v in ('create', 'describe', 'delete', 'scp', 'ssh') if v in argv[:4]), '')
  number = next((a[-1] for a in argv if a.startswith('--process=')), '')
  steps = plan.get((verb if name == 'gcloud' else name) + number, [])
  step = steps.pop(0) if len(steps) > 1 or verb != 'describe' and steps else (steps or [0])[0]
  (home / 'plan.json').write_text(json.dumps(plan))
hosts = [home / 'host0', home / 'host1']
if verb == 'scp' and not step:
  for source in (a for a in argv[4:] if a.startswith('/')):
    [shutil.copy(source, host) for host in hosts]
if step == 'run':
  (command,) = [a.removeprefix('--command=') for a in argv if a.startswith('--command=')]
  shell = lambda home: subprocess.call(
    ['bash', '-c', command], env=os.environ | {{'HOME': str(home)}}, cwd=home
  )
  step = max(map(shell, hosts))
if step in ('wait', 'deaf'):  # for SIGTERM, as a run that saves itself; or for nothing
  signal.signal(signal.SIGTERM, signal.SIG_IGN if step == 'deaf' else lambda *_: os._exit(75))
  print('waits', flush=True)
  time.sleep(20)
if step == 'kill':
  os.kill(os.getpid(), 9)
if isinstance(step, str):
  print(step)
  step = 0
time.sleep(step // 1000)  # 2075 is a code of 75 after two seconds
sys.exit(step % 1000)
"""


class World:
  """A home and a PATH with fake programs; `call` runs a script there."""

  def __init__(self, home: pathlib.Path):
    self.home = home
    for folder in ('bin', 'host0', 'host1'):
      (home / folder).mkdir()
    fake = FAKE.format(python=sys.executable, home=str(home))
    for name in (
      'python',
      'gcloud',
      'kubectl',
      'sbatch',
      'sky',
      'srun',
      'scontrol',
      'squeue',
      'scancel',
    ):
      (home / 'bin' / name).write_text(fake)
      (home / 'bin' / name).chmod(0o755)
    clean = {
      k: v for k, v in os.environ.items() if not k.startswith(('SLURM', 'CUDA', 'XLA', 'JAX'))
    }
    self.env = clean | {'HOME': str(home), 'PATH': f'{home / "bin"}:{os.environ["PATH"]}'}
    self.plan()

  def plan(self, **steps: list) -> None:
    (self.home / 'plan.json').write_text(json.dumps(steps))
    (self.home / 'calls.jsonl').write_text('')

  def command(self, script: str, *arguments: str) -> list[str]:
    return ['bash', str(LAUNCH / f'{script}.sh'), *arguments]

  def call(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    pipes = {'capture_output': True, 'text': True, 'timeout': 60}
    return subprocess.run(
      self.command(script, *arguments), env=self.env | env, cwd=self.home, **pipes
    )

  def calls(self, name: str = '') -> list:
    found = [json.loads(line) for line in (self.home / 'calls.jsonl').read_text().splitlines()]
    return [c for c in found if name in ('', c[0])]

  def verbs(self) -> list[str]:
    """What gcloud was asked for, without looking."""
    verbs = [v for _, argv, *_ in self.calls('gcloud') for v in argv[:4]]
    return [v for v in verbs if v in ('create', 'delete', 'scp', 'ssh')]
