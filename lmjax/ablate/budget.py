"""What an ablation would need on devices that are not here, before it is run."""

from collections.abc import Sequence

from lmjax import config, plan
from lmjax.ablate.arms import Arm
from lmjax.plan import Entry


def plans(arms: Sequence[Arm], topology: str) -> list[Entry]:
  """lmjax.plan of a run of each arm, as its experiment wants it on the topology.

  Raises:
    UserError: an arm cannot run there, or the compiler for it is not here.
  """
  meant = [config.declared(arm.spec, 'TOPOLOGIES', {}).get(topology, {}) for arm in arms]
  return [
    plan.plan(plan.Job(arm.spec, own | arm.given, topology))
    for arm, own in zip(arms, meant, strict=True)
  ]


def lines(
  arms: Sequence[Arm], entries: Sequence[Entry], seeds: int, price_per_hour: float | None
) -> list[str]:
  """Of each arm whether it fits, and of all seeds the hours and the price, in words."""
  said, total = [], 0.0
  cost = lambda hours: '' if price_per_hour is None else f', price {hours * price_per_hour:,.2f}'
  for arm, entry in zip(arms, entries, strict=True):
    memory = entry['memory_gib']
    peak = max(memory['peak'], memory['evaluation'] or 0.0)
    room = f'{peak:.2f} of {memory["capacity"]:.2f} GiB'
    if not entry['fits']:
      said.append(f'{arm.name}: DOES NOT FIT, {room}')
      continue
    hours = seeds * entry['hours']
    total += hours
    said.append(f'{arm.name}: {room}; {seeds} x {entry["hours"]:.3g} hours at least{cost(hours)}')
  several = len(said) > 1
  return said + [f'one after the other: {total:.3g} hours at least{cost(total)}'] * several
