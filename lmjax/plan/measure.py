"""The same step on the devices that are here, to be seen beside its plan."""

import math
import statistics
import time
from typing import Any

import jax
import numpy as np

from lmjax import experiment, hardware, sharding, train
from lmjax.plan import GIB, Entry, Job, made

STEPS = 20


def measure(job: Job, entry: Entry) -> Entry:
  """step_seconds (median), tokens_per_second, mfu, and memory_gib where the device tells it.

  The rows are made up: what they hold changes nothing about time and memory.
  """
  parts, mesh = made(job)
  c = parts.config
  experiment.keep_programs(c)
  with jax.set_mesh(mesh), sharding.logical_axes(c['sharding']['strategy']):
    like, transform, make_state = train.init_state(parts, mesh)
    step = train.lower(parts, mesh, like, transform).compile()
    state, batch = make_state(), parts.abstract_batch()
  places = sharding.batch_shardings(batch, mesh, c['sharding']['strategy'])
  batch = jax.device_put(jax.tree.map(lambda x: _rows(x, c['length']), batch), places)
  seconds = []
  for _ in range(STEPS):
    began = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch))
    seconds.append(time.perf_counter() - began)
  median = statistics.median(seconds)
  stats = mesh.devices.flat[0].memory_stats() or {}
  peak = stats.get('peak_bytes_in_use', math.nan) / GIB
  flops = entry['model_tflop'] * 1e12
  return {
    'step_seconds': median,
    'tokens_per_second': c['batch'] * c['length'] / median,
    'mfu': flops / median / hardware.chip(job.topology).flops,
    'memory_gib': None if math.isnan(peak) else peak,
  }


def _rows(x: jax.ShapeDtypeStruct, length: int) -> Any:
  """Weights of 1, and ids that are places and bytes as well."""
  ids = np.arange(math.prod(x.shape)) % min(length, 256)
  return (
    (ids if np.issubdtype(x.dtype, np.integer) else np.ones_like(ids))
    .reshape(x.shape)
    .astype(x.dtype)
  )
