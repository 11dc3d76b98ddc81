"""For campaigns: small runs in forked processes, so that a trial does not import everything again.

Nothing here may touch a device: a process that has cannot be forked.
"""

import os
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from lmjax import command, config, record, train
from lmjax.steps import Steps

WORDS = 'the of and to in that it was he for his with as had her not at by which have'.split()
OBJECTIVES = {
  'gpt': ('clm', {'model.dropout': 0.1}),
  'bert': ('mlm', {'objective.next_sentence': True, 'model.norm_position': 'post'}),
}


def experiment(name: str, root: pathlib.Path, **overrides: Any) -> dict[str, Any]:
  """A resolved config of a 'gpt' or 'bert' of some thousand parameters; its data lie in `root`."""
  root.mkdir(parents=True, exist_ok=True)
  chance = random.Random(0)
  for part, count in (('train', 80), ('valid', 8)):
    texts = (' '.join(chance.choices(WORDS, k=40)).capitalize() for _ in range(count))
    (root / f'{part}.txt').write_text('\n'.join(f'{text}. Done.' for text in texts))
  objective, own = OBJECTIVES[name]
  c = config.base(objective, tokenizer='bytes')
  settings = {
    **{'check': False, 'steps': 60, 'batch': 8, 'length': 48, 'cache': str(root / 'cache')},
    **{'data.train': str(root / 'train.txt'), 'data.document': 'line'},
    **{'model.depth': 2, 'model.dim': 16, 'model.heads': 2, 'optimizer.ema': 0.9},
    **{'checkpoint.every': 5, 'evaluate.every': 20, 'log.every': 1, 'log.tensorboard': False},
  }
  with c.unlocked():
    c.data.eval = {'valid': str(root / 'valid.txt')}
    c.update_from_flattened_dict(settings | own | overrides)
  return config.resolve(c)


def start(
  c: dict[str, Any],
  name: pathlib.Path,
  before: Callable[[], None] = lambda: None,
  workdir: pathlib.Path | None = None,
) -> int:
  """The number of a process that runs an experiment in `workdir`, by default `name`.

  What it says is added to <name>.log; `before` is called in it first.
  """
  log = pathlib.Path(f'{name}.log')
  if pid := os.fork():
    return pid
  code = 1
  try:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    command.hear_signals()
    before()
    train.run(c, str(workdir or name))
    code = 0
  except BaseException as e:
    code = command._explain(e)
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid: int, timeout: float = 120.0) -> int:
  """The exit code of a process, or minus the signal that has ended it.  It is killed in time."""
  deadline = time.monotonic() + timeout
  while time.monotonic() < deadline:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.005)
  os.kill(pid, signal.SIGKILL)
  os.waitpid(pid, 0)
  raise AssertionError(f'process {pid} did not end within {timeout} s')


def committed(workdir: pathlib.Path) -> list[int]:
  """The steps whose checkpoints are whole."""
  there = workdir / 'checkpoints'
  return Steps(epath.Path(there), read_only=True).all() if there.exists() else []


def differences(first: pathlib.Path, second: pathlib.Path) -> list[str]:
  """In what two runs differ: config, batches, losses, and the final state."""
  return [line for line in record.diff(first, second) if not line.startswith('restart')]
