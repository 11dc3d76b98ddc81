"""What to change so that a run has room: recomputation, micro-batches, strategy."""

import math
from collections.abc import Mapping
from typing import Any

from lmjax import config
from lmjax.config import Overrides, UserError
from lmjax.models.transformer import REMAT
from lmjax.plan import Entry, Job, plan


def search(job: Job) -> tuple[Overrides, Entry] | None:
  """The fastest that fits: overrides of remat, micro-batches and strategy, and its plan.

  Light recomputation first, each with as few micro-batches as have room: their number grows by what
  is missing.  What keeps less is not tried once something fits undivided, as it is only slower.
  """
  found = []
  c = config.resolve(config.load(job.spec, job.overrides))
  for strategy in dict.fromkeys([c['sharding']['strategy'], 'fsdp']):
    elsewhere = {'sharding.strategy': strategy, 'sharding.data': -1}
    elsewhere |= {'sharding.model': 1, 'sharding.sequence': 1}
    base = {} if strategy == c['sharding']['strategy'] else elsewhere
    for remat in REMAT:
      overrides, tried = _enough_micro_batches(job, base | {'model.remat': remat}, c)
      found += [(overrides, tried)] if tried else []
      if tried and 'micro_batches' not in overrides:
        break
    if found:
      return min(found, key=lambda one: one[1]['step_seconds'])
  return None


def _enough_micro_batches(
  job: Job, overrides: Overrides, c: Mapping[str, Any]
) -> tuple[Overrides, Entry | None]:
  micro = c['micro_batches']
  while True:
    try:
      entry = plan(job.but(overrides))
    except UserError:  # it does not divide so
      return overrides, None
    memory = entry['memory_gib']
    if entry['fits']:
      return overrides, entry
    room = memory['capacity'] - memory['arguments']
    if room <= 0 or memory['peak'] <= memory['capacity']:  # or it is evaluation that has none
      return overrides, None
    least = max(micro + 1, micro * memory['temporaries'] / room)
    more = range(math.ceil(least), c['batch'] + 1)
    micro = next((n for n in more if c['batch'] % n == 0), None)
    if micro is None:
      return overrides, None
    overrides = overrides | {'micro_batches': micro}
