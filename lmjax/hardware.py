"""Accelerators by name: what they can do, and devices to compile for where there are none."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import timeit

import jax
import numpy as np
from jax.experimental import topologies

from lmjax.config import did_you_mean
from lmjax.errors import UserError

GIB, GB = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device by its maker's data sheet: bytes, and dense bfloat16 FLOPs, a second."""

  kind: str  # how jax.Device.device_kind begins
  flops: float
  memory: float  # bytes that a program may use
  bandwidth: float  # of that memory
  links: float  # to its neighbours, sent over all links together
  network: float  # to other slices or hosts
  dims: int = 1  # of the torus that the links make; 1 is a switch
  ring: int = 1  # along a dimension that is a multiple of this the links come round
  per_chip: int = 1  # devices on what is sold as a chip


# TPUs: https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, which add up both directions
# of the links; memory is what libtpu 0.0.42 lets a program use.  GPUs: NVIDIA's data sheets of the
# SXM boards, eight to a host, NVLink in one direction, an adapter of 400 Gb/s for each (A100: 200).
CHIPS = {
  'v4': Chip('TPU v4', 275e12, 30.75 * GIB, 1228 * GB, 300 * GB, 6.25 * GB, 3, 4),
  'v5e': Chip('TPU v5 lite', 197e12, 15.75 * GIB, 819 * GB, 200 * GB, 3.125 * GB, 2, 16),
  'v5p': Chip('TPU v5', 459e12, 95.74 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, 3, 4),
  'v6e': Chip('TPU v6 lite', 918e12, 31.25 * GIB, 1638 * GB, 400 * GB, 12.5 * GB, 2, 16),
  'tpu7x': Chip('TPU7x', 1153.5e12, 94.75 * GIB, 3690 * GB, 300 * GB, 6.25 * GB, 3, 4, 2),
  'a100-40gb': Chip('NVIDIA A100-SXM4-40GB', 312e12, 39.4 * GIB, 1555 * GB, 300 * GB, 25 * GB),
  'a100': Chip('NVIDIA A100', 312e12, 79.3 * GIB, 2039 * GB, 300 * GB, 25 * GB),
  'h100': Chip('NVIDIA H100', 989e12, 79.1 * GIB, 3352 * GB, 450 * GB, 50 * GB),
  'h200': Chip('NVIDIA H200', 989e12, 139.8 * GIB, 4800 * GB, 450 * GB, 50 * GB),
}
BY_HOST = 8  # GPUs


def chip_of(device: jax.Device) -> Chip | None:
  """None where nobody knows it, as for CPUs and for boards that do less than those in the table."""
  if re.search('PCIe|NVL', device.device_kind, re.IGNORECASE):
    return None
  known = (chip for chip in CHIPS.values() if device.device_kind.startswith(chip.kind))
  return max(known, key=lambda chip: len(chip.kind), default=None)


@functools.cache
def peak_flops() -> float:
  """FLOP/s of a device that is here: from the table, or, of a CPU, as measured once in float32.

  nan for an accelerator that the table does not know.
  """
  device = jax.devices()[0]
  known = chip_of(device)
  if known or device.platform != 'cpu':
    return known.flops if known else math.nan
  n = 1024
  x = jax.device_put(np.ones((n, n), np.float32))
  product = jax.jit(lambda a: a @ a)  # on all devices of the mesh at once, which share the cores
  once = lambda: product(x).block_until_ready()
  once()
  return 2 * n**3 / min(timeit.repeat(once, number=1, repeat=5))


# ------------------------------------------------------------------------------------ topologies


@functools.cache
def chip(topology: str) -> Chip:
  """What a device of it can do; of a CPU, what this one does now, shared by as many devices.

  Raises:
    UserError: an accelerator is here that the table does not know.
  """
  kind, size = _split(topology)
  if kind in CHIPS and CHIPS[kind].dims == 1:
    return dataclasses.replace(CHIPS[kind], memory=CHIPS[kind].memory * _share_of_gpu())
  if kind in CHIPS:
    return CHIPS[kind]
  here = jax.devices()
  if kind == 'here' and here[0].platform != 'cpu':
    if found := chip_of(here[0]):
      limit = (here[0].memory_stats() or {}).get('bytes_limit', found.memory)
      return dataclasses.replace(found, memory=limit)
    raise UserError(f'nobody has written down what a {here[0].device_kind} can do')
  n, x, y = int(size or len(here)), np.ones(1 << 24), np.ones(1 << 24)
  bandwidth = 2 * x.nbytes / min(timeit.repeat(lambda: np.copyto(y, x), number=1, repeat=5)) / n
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / n
  return Chip('cpu', peak_flops() / n, memory, bandwidth, bandwidth, bandwidth)


def _share_of_gpu() -> float:
  """Of its memory, as JAX takes it when it starts."""
  names = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')  # now, and before
  share = next((os.environ[name] for name in names if name in os.environ), '0.75')
  if not re.fullmatch(r'\d*\.?\d+', share):
    raise UserError(f'XLA_CLIENT_MEM_FRACTION = {share} is no share like 0.75')
  return float(share)


def compiler(topology: str) -> str:
  """Its version; of the devices that are here, also what they are."""
  kind = _split(topology)[0]
  if kind == 'here':
    device = jax.devices()[0]
    return f'{device.device_kind} {device.client.platform_version}'
  package = 'jaxlib' if kind == 'cpu' else 'libtpu' if CHIPS[kind].dims > 1 else 'jax-cuda13-plugin'
  return f'{package} {importlib.metadata.version(package)}'


def prepare(names: list[str]) -> None:
  """Before JAX starts: it is to compile for these topologies, not to use what is here."""
  cpus = [int(size) for kind, size in map(_split, names) if kind == 'cpu' and size.isdecimal()]
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)  # what is read of programs is kept
  jax.config.update('jax_num_cpu_devices', max([1, *cpus]))
  # Otherwise libtpu asks the network what machine this is, and two cannot compile at once.
  os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  for name, value in (
    ('TPU_ACCELERATOR_TYPE', 'v5litepod-1'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
  ):
    os.environ.setdefault(name, value)  # or it complains that it does not know
  # There is nothing here on which the compiler for GPUs could try what is fastest.
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ |= {'CUDA_VISIBLE_DEVICES': '-1', 'XLA_FLAGS': f'{flags} --xla_gpu_autotune_level=0'}


def devices(name: str) -> list[jax.Device]:
  """The devices of a topology: v5e:4x4, v5e:4x4@2 (two slices), h100:8, cpu:8, or here.

  Raises:
    UserError: there is no such topology, or its compiler is not installed.
  """
  kind, size = _split(name)
  if name == 'here':
    return jax.devices()
  if kind == 'cpu' and size.isdecimal() and 0 < int(size) <= len(jax.devices('cpu')):
    return jax.devices('cpu')[: int(size)]
  if kind == 'cpu':
    raise UserError(f'"{name}" is no topology: a number of CPU devices is missing, as in cpu:8')
  if kind not in CHIPS:
    raise UserError(f'there is no hardware "{kind}"{did_you_mean(kind, [*CHIPS, "cpu"])}')
  if CHIPS[kind].dims == 1:
    return _gpus(name, kind, size)
  return _tpus(name, kind, size)


def _split(name: str) -> tuple[str, str]:
  kind, _, size = name.partition(':')
  return kind, size


def _tpus(name: str, kind: str, size: str) -> list[jax.Device]:
  shape, _, slices = size.partition('@')
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)+(@[1-9]\d*)?', size):
    raise UserError(f'"{name}" is no topology: write it as v5e:4x4, or v5e:4x4@2 for two slices')
  if shape.count('x') + 1 != CHIPS[kind].dims:  # libtpu would abort the process, or agree
    raise UserError(f'"{name}" is no topology: {kind} is a torus of {CHIPS[kind].dims} dimensions')
  _need('libtpu', 'tpu', name)
  sizes = [int(n) for n in shape.split('x')] + [1]
  hosts = (*(min(2, n) for n in sizes[:2]), 1)
  options = dict(chips_per_host_bounds=hosts, num_slices=int(slices or 1))
  options |= {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  try:
    return topologies.get_topology_desc(f'{kind}:{shape}', 'tpu', **options).devices
  except jax.errors.JaxRuntimeError as e:
    raise UserError(f'"{name}" is no topology: {str(e).splitlines()[0]}') from e


# kind -> what the compiler asks of it: capability, processors, clock in GHz, shared memory of each.
GPUS = {
  'a100-40gb': ('major: 8', 108, 1.41, 166_912),
  'a100': ('major: 8', 108, 1.41, 166_912),
  'h100': ('major: 9 feature_extension: ACCELERATED_FEATURES', 132, 1.98, 232_448),
  'h200': ('major: 9 feature_extension: ACCELERATED_FEATURES', 132, 1.98, 232_448),
}
TARGET = """
gpu_device_info {{
  name: "{kind}" cuda_compute_capability {{ {capability} }}
  core_count: {cores} clock_rate_ghz: {clock} fpus_per_core: 128
  device_memory_size: {memory:.0f} memory_bandwidth: {bandwidth:.0f} l2_cache_size: {cache}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {all_shared}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
"""  # an xla.GpuTargetConfigProto


def _gpus(name: str, kind: str, size: str) -> list[jax.Device]:
  count = int(size) if size.isdecimal() else 0
  if not count or count % min(count, BY_HOST):
    raise UserError(f'"{name}" is no topology: up to {BY_HOST} GPUs, or a multiple, as in h100:8')
  _need('jax_cuda13_plugin', 'gpu', name)
  chip, (capability, cores, clock, shared) = CHIPS[kind], GPUS[kind]
  target = TARGET.format(
    kind=chip.kind,
    capability=capability,
    cores=cores,
    clock=clock,
    memory=chip.memory,
    bandwidth=chip.bandwidth,
    cache=(40 if kind.startswith('a100') else 50) * 2**20,
    shared=shared,
    all_shared=shared + 1024,
  )
  hosts, each = -(-count // BY_HOST), min(count, BY_HOST)
  where = dict(platform='cuda', target_config=target, topology=f'1x{hosts}x{each}')
  return topologies.get_topology_desc(**where).devices


def _need(module: str, extra: str, name: str) -> None:
  if not importlib.util.find_spec(module):
    raise UserError(f"{name} needs its compiler: pip install -e '.[{extra}]'")
