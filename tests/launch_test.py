"""The launch scripts: what they run, what arrives there, when they try again, and what they say."""

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml

from tests.programs import LAUNCH, World

SCRIPTS = ('local', 'tpu_vm', 'gke', 'slurm', 'skypilot')
INSIDE = ('slurm_job', 'tpu_vm_host')  # what two of them bring along
NASTY = [
  *"--config=experiments/gpt2.py:small it's $HOME ${HOME} $(HOME) $$(HOME) $ `id` > >f <<<".split(),
  *'; & && | * ? [a] {a,b} ~ ! # %s \\ \\n \\& \\1 -- -n --dry_run --processes=3 é😀'.split(),
  *('"', '', ' ', 'two  words', 'a\nb\n', '\n', '\t', '\r', '\x01\x7f', '\x85\u2028\ufeff'),
  *(': x', '- y', "$'a'", '{{a}}'),
]


@pytest.fixture
def world(tmp_path) -> World:
  return World(tmp_path)


TPU = ['--name=a', '--zone=z', '--pause=0', '--poll=0', '--install=true']
NEW = [*TPU, '--accelerator_type=v6e-8', '--runtime_version=v2']
GKE = ['--image=i', '--accelerator=tpu-v6e-slice', '--topology=4x4']
SKY = ['--accelerators=H100:8']


# ------------------------------------------------------------------------------ the scripts as such


@pytest.mark.parametrize('name', [*SCRIPTS, *INSIDE, 'options'])
def test_scripts_are_small_and_say_what_they_do(world, name):
  text = (LAUNCH / f'{name}.sh').read_text()
  assert text.count('\n') < 150
  if name != 'options':
    assert '\nset -euo pipefail\n' in text
    said = world.call(name, '--help')
    assert (said.returncode, said.stderr) == (0, '')
    header = text.split('\nset -euo')[0].splitlines()[1:]
    assert said.stdout.splitlines()[: len(header)] == [line[2:] for line in header]
  if name in SCRIPTS:
    options = set(
      re.findall(r'\[([a-z_]+)\]=', text.split('declare -A o=')[1].split('read_opt')[0])
    )
    assert options == set(re.findall(r'^# --([a-z_]+) ', text, re.M)), 'the header has others'


def test_shellcheck():
  if not shutil.which('shellcheck'):
    pytest.skip('shellcheck is not installed')
  files = sorted(LAUNCH.glob('*.sh'))
  done = subprocess.run(['shellcheck', '-x', *files], capture_output=True, text=True)
  assert done.stdout + done.stderr == ''


@pytest.mark.parametrize(
  ('script', 'options', 'says'),
  [
    *[(s, ['--colour=red', '--', 'a'], '--colour') for s in SCRIPTS],
    *[(s, ['stray', '--', 'a'], "'stray' is no option") for s in SCRIPTS],
    *[(s, ['--x[$(touch pwned)]=1'], 'is no option') for s in SCRIPTS],
    *[(s, ['--module'], '--module needs a value') for s in SCRIPTS],
    *[(s, ['--dry_run=yes'], '--dry_run takes no value') for s in SCRIPTS],
    ('local', [], 'nothing stands behind --'),
    ('local', ['--processes=0', '--', 'a'], '--processes must be a whole number of at least 1'),
    ('local', ['--processes', '08', '--pause', 'x', '--', 'a'], '--pause must be a whole number'),
    ('local', ['--devices=tpu:4', '--', 'a'], 'neither cpu:N nor gpu:N'),
    ('local', ['--devices=gpu:2', '--processes=2', '--', 'a'], 'CUDA_VISIBLE_DEVICES has 3'),
    ('tpu_vm', [*NEW], 'nothing stands behind --'),
    ('tpu_vm', ['--zone=z', '--', 'a'], 'give --name'),
    ('tpu_vm', [*TPU, '--', 'a'], 'give --accelerator_type'),
    ('tpu_vm', [*NEW, '--name=A b', '--', 'a'], "--name='A b' must be of a-z"),
    ('tpu_vm', [*NEW, '--', 'a'], 'a is there already: name another, or use it with --existing'),
    ('gke', [*GKE], 'nothing stands behind --'),
    ('gke', ['--', 'a'], 'give --image'),
    ('gke', [*GKE, '--topology=16', '--', 'a'], 'is not like 4x4'),
    ('gke', [*GKE, '--chips=3', '--', 'a'], 'no whole number of hosts of 3'),
    ('gke', [*GKE, '--', os.fsdecode(b'\xff')], 'is not UTF-8'),
    ('skypilot', [*SKY, '--infra', os.fsdecode(b'\xff'), '--', 'a'], 'is not UTF-8'),
    ('slurm', [], 'nothing stands behind --'),
    ('slurm', ['--array=nowhere'], "--array='nowhere' is not a file"),
    ('slurm', ['--array=plan.json', '--', 'a'], 'nothing may stand behind --'),
    ('slurm', ['--array=empty'], 'has no lines'),
    ('slurm', ['--at_most=3', '--', 'a'], '--at_most is for an --array'),
    ('skypilot', ['--', 'a'], 'give --accelerators'),
    ('skypilot', [*SKY, '--nodes=2', '--bucket=gs://b', '--', 'a'], '--bucket is for one node'),
    ('skypilot', [*SKY, '--bucket=b', '--', 'a'], 'is not like gs://NAME'),
  ],
)
def test_mistakes_are_sentences(world, script, options, says):
  world.plan(describe=['ACTIVE'])
  (world.home / 'empty').write_text('')
  done = world.call(script, *options, CUDA_VISIBLE_DEVICES='0,1,2')
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith(f'{script}.sh: ')
  assert says in done.stderr
  assert done.stderr.count('\n') == 1
  assert done.stdout == ''
  assert all('describe' in argv for _, argv, *_ in world.calls())
  assert not (world.home / 'pwned').exists()


# -------------------------------------------------------------- what is run, and what arrives there

LOCAL2 = ['--processes=2', '--port=7000']
RUNS = {
  'local': ['local', '--module=lmjax.evaluate'],
  'local_cpu': ['local', *LOCAL2, '--devices=cpu:4'],
  'local_gpu': ['local', *LOCAL2, '--devices=gpu:2'],
  'slurm': ['slurm', '--nodes=2', '--tasks_per_node=4', '--time=30', '--gpus=4', '--cpus=8'],
  'gke': ['gke', *GKE, '--apply'],
  'skypilot': ['skypilot', *SKY, '--launch'],
  'tpu_vm': ['tpu_vm', *NEW, '--spot', '--project=p'],
  'tpu_vm_existing': ['tpu_vm', *TPU, '--existing'],
}


@pytest.mark.parametrize('name', RUNS)
def test_a_dry_run_shows_what_is_run_and_does_nothing(world, name):
  script, *options = RUNS[name]
  shown = world.call(script, *options, '--dry_run', '--', *NASTY)
  assert (shown.returncode, shown.stderr, world.calls()) == (0, '', [])
  assert {p.name for p in world.home.iterdir()} == {
    'bin',
    'host0',
    'host1',
    'plan.json',
    'calls.jsonl',
  }
  world.plan(describe=['', 'ACTIVE'])
  done = world.call(script, *options, '--', *NASTY)
  assert done.returncode == 0, done.stderr
  order = lambda calls: [c[:4] for c in calls if 'describe' not in c[1]]
  real = order(world.calls())
  world.plan()
  subprocess.run(
    ['bash', '-e'], input=shown.stdout, env=world.env, cwd=world.home, text=True, check=True
  )
  key = json.dumps if script == 'local' else lambda _: 0  # processes begin in any order
  assert sorted(order(world.calls()), key=key) == sorted(real, key=key) != []


@pytest.mark.parametrize(
  ('name', 'program'), [('gke', 'kubectl'), ('skypilot', 'sky'), ('slurm', 'sbatch')]
)
def test_what_is_refused_there_fails_here(world, name, program):
  script, *options = RUNS[name]
  world.plan(**{program: [3]})
  done = world.call(script, *options, '--', 'a')
  assert done.returncode == 3
  assert len(world.calls(program)) == 1


def expanded(word: str) -> str:
  """What Kubernetes makes of a word of a command; there is no variable that it knows."""
  return re.sub(r'\$\$|\$\(([^)]*)\)', lambda m: '$' if m[0] == '$$' else 'gone', word)


def job(world: World, *options: str, **env: str) -> list[str]:
  """What a SLURM job would run, by its script."""
  assert world.call('slurm', *options).returncode == 0
  argv = world.calls('sbatch')[0][1]
  script = next(i for i, a in enumerate(argv) if a.endswith('/slurm_job.sh'))
  world.plan(srun=[0])
  done = world.call('slurm_job', *argv[script + 1 :], SLURM_JOB_ID='7', **env)
  assert done.returncode == 0, done.stderr
  (call,) = world.calls('srun')
  assert call[1][0] == '--kill-on-bad-exit=0'
  return call[1][1:]


@pytest.mark.parametrize('script', SCRIPTS)
def test_arguments_arrive_intact(world, script):
  options = {'tpu_vm': NEW, 'gke': GKE, 'skypilot': SKY}.get(script, [])
  world.plan(ssh=[0, 'run'], describe=['', 'ACTIVE'])
  if script == 'slurm':
    assert job(world, '--', *NASTY) == ['python', '-m', 'lmjax.main', *NASTY]
    return
  done = world.call(script, *options, '--', *NASTY)
  assert done.returncode == 0, done.stderr
  if script == 'gke':
    spec = yaml.safe_load(done.stdout)['spec']['replicatedJobs'][0]['template']['spec']
    (container,) = spec['template']['spec']['containers']
    assert [expanded(w) for w in container['command']] == ['python', '-m', 'lmjax.main', *NASTY]
    return
  if script == 'skypilot':
    run = yaml.safe_load(done.stdout)['run']
    subprocess.run(['bash', '-c', run], env=world.env, check=True)
  assert [c[1] for c in world.calls('python')] == [['-m', 'lmjax.main', *NASTY]] * (
    2 if script == 'tpu_vm' else 1
  )


def test_devices_of_each_process(world):
  seen = lambda *options, **env: sorted(
    (c[1][4], tuple(c[3].values()))
    for c in (
      world.plan(),
      world.call('local', *LOCAL2, *options, '--', 'a', **env),
      world.calls(),
    )[2]
  )
  flag = '--xla_force_host_platform_device_count=4'
  zero, one = '--process=0', '--process=1'
  assert seen() == [(zero, ()), (one, ())]
  assert seen('--devices=cpu:4') == [(zero, (flag, 'cpu')), (one, (flag, 'cpu'))]
  assert seen('--devices=gpu:2') == [(zero, ('0,1',)), (one, ('2,3',))]
  four = {'CUDA_VISIBLE_DEVICES': '7,5,MIG-3,1'}
  assert seen('--devices=gpu:1', **four) == [(zero, ('7',)), (one, ('5',))]


def test_what_sbatch_is_given(world):
  lines = world.home / 'two lines'
  lines.write_text('echo "a  b" $X\necho last')
  options = ['--nodes=2', '--partition=p', '--time=1-0', '--at_most=1', '--wait', '--log=l']
  env = {'SLURM_ARRAY_TASK_ID': '1', 'SLURM_ARRAY_JOB_ID': '7', 'SLURM_CPUS_PER_TASK': '3'}
  assert job(world, '--array', lines.name, *options, **env) == ['bash', '-c', 'echo "a  b" $X']
  world.plan()
  world.call('slurm', '--array', lines.name, *options)
  assert {
    *('--array=1-2%1', '--nodes=2', '--ntasks-per-node=1', '--partition=p', '--time=1-0', '--wait'),
    *('--output=l', '--requeue', '--open-mode=append', '--signal=B:TERM@120', '--job-name=lmjax'),
  } < set(world.calls()[0][1])


def test_the_jobset(world):
  done = world.call(
    'gke', *GKE, '--slices=2', '--spot', '--queue=q', '--service_account=s', '--', 'a'
  )
  spec = yaml.safe_load(done.stdout)
  (slice_,) = spec['spec']['replicatedJobs']
  assert slice_['replicas'] == 2
  inner = slice_['template']['spec']
  assert (inner['parallelism'], inner['completions'], inner['backoffLimit']) == (4, 4, 0)
  (rule,) = inner['podFailurePolicy']['rules']
  assert rule['action'] == 'FailJob'
  assert rule['onExitCodes']['operator'] == 'NotIn'
  assert not {2, 70, 74, 1} & set(rule['onExitCodes']['values'])
  assert 75 in rule['onExitCodes']['values']
  (rule,) = spec['spec']['failurePolicy']['rules']
  assert (rule['action'], rule['onJobFailureReasons']) == ('FailJobSet', ['PodFailurePolicy'])
  pod = inner['template']['spec']
  assert pod['serviceAccountName'] == 's'
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v6e-slice',
    'cloud.google.com/gke-tpu-topology': '4x4',
    'cloud.google.com/gke-spot': 'true',
  }
  assert pod['containers'][0]['resources']['limits'] == {'google.com/tpu': 4}


def test_the_task_of_several_nodes(world):
  done = world.call('skypilot', *SKY, '--nodes=2', '--spot', '--infra=gcp/us-central1', '--', 'a')
  task = yaml.safe_load(done.stdout)
  assert (task['num_nodes'], task['workdir']) == (2, str(LAUNCH.parent))
  assert task['resources'] == {
    'accelerators': 'H100:8',
    'use_spot': True,
    'infra': 'gcp/us-central1',
    'job_recovery': {'recover_on_exit_codes': [75]},
  }
  nodes = {
    'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2',
    'SKYPILOT_NUM_NODES': '2',
    'SKYPILOT_NODE_RANK': '1',
  }
  subprocess.run(['bash', '-c', task['run']], env=world.env | nodes, check=True)
  meet = ['--coordinator=10.0.0.1:10077', '--processes=2', '--process=1']
  assert world.calls('python')[0][1] == ['-m', 'lmjax.main', *meet, 'a']
