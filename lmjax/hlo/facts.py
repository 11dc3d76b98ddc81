"""What there is to know of a program that is compiled: read once, and kept in the cache."""

import hashlib
import json
import os
import pathlib
import re
import sys
import tempfile
import time
import uuid
from typing import Any

import jax
from etils import epath

from lmjax import hardware
from lmjax.errors import UserError
from lmjax.hlo import buffers
from lmjax.hlo.costs import Program

Facts = dict[str, Any]
_AGAIN = 'rematted_computation'  # JAX's name for what the backward pass computes again


def of(lowered: jax.stages.Lowered, topology: str, cache: str, name: str = 'it') -> Facts:
  """Of one device: bytes, FLOPs, runs of kernels, and the temporaries when they are largest.

  Where the program has no room there ('fits'), all but the bytes of its arguments.
  """
  # A learning rate does not change what a program costs, so that most arms of a sweep are one.
  text = re.sub(r'dense<[-+.\deE]+> : tensor<f32>', 'dense<0.> : tensor<f32>', lowered.as_text())
  ours = [*sorted(pathlib.Path(__file__).parent.glob('*.py')), pathlib.Path(hardware.__file__)]
  key = [jax.__version__, hardware.compiler(topology), topology, text]
  key += [path.read_text() for path in ours]
  key += [os.environ.get(name) for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')]
  digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
  path = epath.Path(cache).expanduser() / 'plans' / f'{digest}.json'
  if path.exists():
    return json.loads(path.read_text())
  print(f'compiling {name} for {topology} …', file=sys.stderr, flush=True)
  began = time.perf_counter()
  tpu = hardware.devices(topology)[0].platform == 'tpu'
  with tempfile.TemporaryDirectory() as dump:
    options = {'xla_dump_to': dump, 'xla_dump_hlo_as_text': True} if tpu else {}
    try:
      compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      facts = {'fits': False, 'temporaries': _asked_for(str(e))}  # so it is a TPU's compiler
      (program,) = pathlib.Path(dump).glob('*after_optimizations.txt')
      facts |= _of_text(program.read_text())
    else:
      facts = {'fits': True, **_read(compiled, pathlib.Path(dump))}
  facts['compile_seconds'] = time.perf_counter() - began
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_suffix(f'.{uuid.uuid4().hex[:8]}.tmp')
  scratch.write_text(json.dumps(facts))
  scratch.replace(path)
  return facts


def _asked_for(error: str) -> float:
  """Bytes of temporaries that there was no room for.

  Raises:
    UserError: it was no room in the device's memory that was missing.
  """
  found = re.search(r'HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM', error)
  if not found:
    raise UserError(f'the compiler gives up: {error.splitlines()[0]}')
  size, unit = found.groups()
  return float(size) * 1024 ** ('KMGT'.index(unit) + 1)


def _read(compiled: jax.stages.Compiled, dump: pathlib.Path) -> Facts:
  memory = compiled.memory_analysis()
  return {
    'arguments': memory.argument_size_in_bytes,
    'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,
    'temporaries': _temporaries(memory, dump),
    **_of_text(compiled.as_text()),
  }


def _of_text(text: str) -> Facts:
  program = Program(text)
  sent: dict[tuple, float] = {}
  for cost in program.collectives:
    sent[cost.kind, cost.group] = sent.get((cost.kind, cost.group), 0) + cost.total
  return {
    'dot_flops': sum(cost.total for cost in program.products),
    'moved': sum(cost.total for cost in program.moves),
    'kernel_runs': sum(cost.times for cost in program.kernels if 'transpose(' not in cost.where),
    'kernel_runs_again': sum(cost.times for cost in program.kernels if _AGAIN in cost.where),
    'uncounted_loops': len(program.uncounted),
    'sent': [[kind, group, size] for (kind, group), size in sent.items()],
    'largest': [
      [b.bytes, f'{b.array.dtype}{list(b.array.dims)}', b.where] for b in buffers.at_peak(text)[:8]
    ],
  }


def _temporaries(memory: Any, dump: pathlib.Path) -> int:
  """Bytes that they take; of TPUs as the compiler's report on its buffers says.

  Its sum, which `memory` has, counts a place as often as different arrays lie there in turn: 2.95
  for 2.11 GiB (GPT-2 small on v5e:4x4, libtpu 0.0.42).
  """
  reports = ''.join(path.read_text() for path in dump.glob('*memory-usage-report.txt'))
  total = re.search(r'default \(color=0\)\nTotal bytes: (\d+)', reports)
  if not total:
    return memory.temp_size_in_bytes
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return int(total[1]) - memory.argument_size_in_bytes - outputs
