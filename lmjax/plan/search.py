"""What to change so that a run has room: strategy, recomputation, micro-batches."""

import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from lmjax import config, sharding
from lmjax.config import Overrides
from lmjax.errors import UserError
from lmjax.models.transformer import REMAT
from lmjax.plan import Entry, Job, made, plan


def search(job: Job) -> tuple[Overrides, Entry] | None:
  """The fastest that fits: overrides of strategy, remat and micro-batches, and its plan.

  Light recomputation first, each with as few micro-batches as have room: their number grows by what
  is missing.  What keeps less is not tried once something fits undivided, as it is only slower, nor
  where the state alone has no room.
  """
  found = []
  own = config.resolve(config.load(job.spec, job.overrides))['sharding']['strategy']
  for strategy in _strategies(own):
    try:
      parts, mesh = made(job.but(strategy))
    except UserError:  # it does not divide so
      continue
    for remat in REMAT:
      chosen = strategy | {'model.remat': remat}
      overrides, entry = _enough_micro_batches(job, chosen, parts.config, mesh)
      if entry['fits']:
        found.append((overrides, entry))
        if 'micro_batches' not in overrides:
          break
      if entry['memory_gib']['arguments'] > entry['memory_gib']['capacity']:
        break
  return min(found, key=lambda one: one[1]['step_seconds'], default=None)


def _strategies(own: str) -> list[Overrides]:
  """The one asked for, and those that need less memory for the state, on as many devices."""
  less = ['zero', 'fsdp'] if own == 'replicate' else ['fsdp'] if own != 'fsdp' else []
  mesh = {'sharding.data': -1, 'sharding.sequence': 1, 'sharding.model': 1}
  return [{}, *({'sharding.strategy': name, **mesh} for name in less)]


def _enough_micro_batches(
  job: Job, overrides: Overrides, c: Mapping[str, Any], mesh: Mesh
) -> tuple[Overrides, Entry]:
  """The first that fits, or the last that divides."""
  micro = c['micro_batches']
  while True:
    entry = plan(job.but(overrides))
    memory = entry['memory_gib']
    room = memory['capacity'] - memory['arguments']
    # Where the step has room and it does not fit, it is evaluation that has none.
    if entry['fits'] or room <= 0 or memory['peak'] <= memory['capacity']:
      return overrides, entry
    least = max(micro + 1, micro * memory['temporaries'] / room)
    more = range(math.ceil(least), c['batch'] + 1)
    micro = next((n for n in more if _divides(c | {'micro_batches': n}, mesh)), None)
    if micro is None:
      return overrides, entry
    overrides = overrides | {'micro_batches': micro}


def _divides(c: Mapping[str, Any], mesh: Mesh) -> bool:
  try:
    sharding.check_batch(c, mesh)
  except UserError:
    return False
  return True
