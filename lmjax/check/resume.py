"""Proves of one experiment what lmjax promises of all runs that are taken up.

One that is killed with SIGKILL, again and again, and taken up each time ends with the bits of one
that is not; taken up on another number of devices it sees the same batches, and its losses differ
by rounding only.
"""

import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from lmjax import command, record
from lmjax import workdir as workdir_lib
from lmjax.errors import UserError

LIMIT = 1e-5  # relative, of the losses on other devices
_UNKILLED = 'the run ended before it could be killed: give it more --steps'


def prove(given: Mapping[str, Any], steps: int, kills: int) -> bool:
  """Whether it holds for the experiment of a resolved config; says what it sees.

  Raises:
    UserError: the experiment does not run, or is over before it can be killed.
  """
  chance, c = random.Random(0), shortened(given, steps)
  with tempfile.TemporaryDirectory(prefix='lmjax-check-') as scratch:
    at = pathlib.Path(scratch)
    (at / 'config.json').write_text(json.dumps(c))
    (at / 'experiment.py').write_text(workdir_lib.EXPERIMENT)
    run(at / 'straight')
    print(f'{steps} steps without a stop: state {record.final_state(at / "straight")}', flush=True)
    killed = 0
    while killed < kills and not (at / 'broken' / 'result.json').exists():
      step = run(at / 'broken', chance.randint(1, steps - 1), chance.random() / 20)
      killed += step > 0
      if step:
        print(f'killed when step {step} was logged', flush=True)
    run(at / 'broken')
    if not killed:
      raise UserError(_UNKILLED)
    differences = list(record.diff(at / 'straight', at / 'broken'))
    print('\n'.join(differences) or record.verdict(at / 'straight', at / 'broken'), flush=True)
    return not differences and _holds_elsewhere(at, c['deterministic_sum'])


def shortened(given: Mapping[str, Any], steps: int) -> dict[str, Any]:
  """The experiment, in no more than so many steps, and with checkpoints between."""
  c = {key: dict(value) if isinstance(value, Mapping) else value for key, value in given.items()}
  c['steps'], c['check'] = steps, False
  c['checkpoint'] |= {'every': max(1, steps // 4), 'minutes': 0.0, 'keep_best': ''}
  c['evaluate'] |= {'every': steps, 'batches': 1}
  c['log'] |= {'every': 1, 'tensorboard': False, 'sample': ''}
  c['optimizer']['warmup_steps'] = min(c['optimizer']['warmup_steps'], steps // 2)
  return c


def _holds_elsewhere(at: pathlib.Path, exact: bool) -> bool:
  """Whether a run that is killed and taken up on other devices agrees with the straight one."""
  (kind, count), *others = record.read(at / 'straight', 'record.json')['machine']['devices'].items()
  other = count // 2 or 2
  environment = {'CUDA_VISIBLE_DEVICES': ','.join(map(str, range(other)))}
  if kind.startswith('cpu'):
    flag = f'--xla_force_host_platform_device_count={other}'
    environment = {'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flag}'}
  elif others or kind.startswith('tpu') or count == 1:
    print(f'not looked at: how it goes on with another number of devices than {count} {kind}')
    return True
  killed = run(at / 'moved', len(record.lines(at / 'straight', 'ledger.jsonl')) // 2)
  if not killed:
    raise UserError(_UNKILLED)
  run(at / 'moved', environment=environment)
  batches, losses = (
    [
      [line[key] for line in record.lines(at / name, file) if key in line]
      for name in ('straight', 'moved')
    ]
    for file, key in (('ledger.jsonl', 'hash'), ('metrics.jsonl', 'train/loss'))
  )
  worst = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
  exact &= min(count, other) > 1  # one device alone rounds in its own way, in bfloat16
  same = record.final_state(at / 'straight') == record.final_state(at / 'moved')
  state = 'the same' if same else 'ANOTHER' if exact else 'as rounding has it, another'
  print(
    f'killed when step {killed} was logged, and on with {other} instead of {count} device(s): '
    f'{"the same" if batches[0] == batches[1] else "OTHER"} batches; losses differ by {worst:.1e}, '
    f'of {LIMIT:.0e}; {state} state'
  )
  return batches[0] == batches[1] and worst <= LIMIT and (same or not exact)


def run(
  workdir: pathlib.Path,
  kill_after: int = 0,
  delay: float = 0.0,
  environment: Mapping[str, str] | None = None,
) -> int:
  """Runs the experiment beside `workdir`; the step at which it was killed, or 0 at its end."""
  experiment = f'--config={workdir.with_name("experiment.py")}'
  arguments = [sys.executable, '-m', 'lmjax.main', experiment, f'--workdir={workdir}']
  step, variables = 0, os.environ | dict(environment or {})
  before = _file(workdir)
  with workdir.with_suffix('.log').open('w+') as said:
    with command.child(arguments, stdout=said, stderr=said, env=variables) as process:
      while process.poll() is None:
        step = logged(workdir) if _file(workdir) != before else 0  # of this start, not a former one
        if kill_after and step >= kill_after:
          time.sleep(delay)
          process.kill()
          process.wait()
        time.sleep(0.005)
    if process.returncode and not (kill_after and process.returncode == -signal.SIGKILL):
      said.seek(0)
      raise UserError(f'the run ended with {process.returncode}:\n{said.read()[-2000:]}')
  return step if process.returncode else 0


def _file(workdir: pathlib.Path) -> int:
  """Every start writes its metrics into a new file."""
  path = workdir / 'metrics.jsonl'
  return path.stat().st_ino if path.exists() else 0


def logged(workdir: pathlib.Path) -> int:
  """The last step of the metrics, which may be being written."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'"train/loss"') if path.exists() else 0
