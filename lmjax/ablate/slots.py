"""A machine in equal shares, each for one run of an ablation at a time."""

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

from lmjax.errors import UserError

CONFINES = hasattr(os, 'sched_setaffinity')  # macOS runs a process where it likes


class Slot(NamedTuple):
  """A share of this machine's devices, for one run at a time."""

  environment: Mapping[str, str]
  cores: frozenset[int]


def slots(parallel: int) -> list[Slot]:
  """The devices that are here in so many equal shares.

  Raises:
    UserError: they do not divide.
  """
  cores = sorted(os.sched_getaffinity(0)) if CONFINES else range(os.cpu_count() or 1)
  if parallel == 1:
    return [Slot({}, frozenset(cores))]
  platform, count = _devices()
  on = {'gpu': 'GPUs', 'tpu': 'TPU chips', 'cpu': 'CPU cores'}[platform]
  count = len(cores) if platform == 'cpu' else count
  if count % parallel:
    raise UserError(f'--parallel={parallel} does not divide the {count} {on} of this machine')
  each, share = count // parallel, len(cores) // parallel or len(cores)
  if platform == 'tpu' and each > 1:
    raise UserError(f'a run has one TPU chip beside others, or all: --parallel={count} or 1')
  found = []
  for number in range(parallel):
    mine = ','.join(_visible(platform, count)[number * each : (number + 1) * each])
    environment = {
      'gpu': {'CUDA_VISIBLE_DEVICES': mine},
      'tpu': {
        'TPU_VISIBLE_CHIPS': mine,
        'TPU_CHIPS_PER_PROCESS_BOUNDS': '1,1,1',
        'TPU_PROCESS_BOUNDS': '1,1,1',
      },
      'cpu': {},
    }[platform]
    first = number * share % len(cores)
    found.append(Slot(environment, frozenset(cores[first : first + share])))
  return found


def _visible(platform: str, count: int) -> list[str]:
  given = os.environ.get('CUDA_VISIBLE_DEVICES', '') if platform == 'gpu' else ''
  return given.split(',') if given else [str(number) for number in range(count)]


def _devices() -> tuple[str, int]:
  """Asked in a process of its own, which lets go of them again."""
  ask = 'import jax; d = jax.local_devices(); print("\\n", d[0].platform, len(d))'
  said = subprocess.run([sys.executable, '-c', ask], capture_output=True, text=True, check=True)
  platform, count = said.stdout.split()[-2:]
  return platform, int(count)
