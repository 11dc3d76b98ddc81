"""What the devices that run a program send each other."""

import math
import re

import numpy as np

from lmjax.hlo.text import Array, Instruction

_SENT_BETWEEN_SLICES = {  # times what is handed over
  'all-gather': lambda n: n - 1,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'one-to-one': lambda n: 1,
}
_SENT = {  # bytes that a device of a group of n sends
  'all-gather': lambda results, n: sum(x.bytes for x in results) * (n - 1) / n,
  'all-reduce': lambda results, n: 2 * sum(x.bytes for x in results) * (n - 1) / n,
  'reduce-scatter': lambda results, n: sum(x.bytes for x in results) * (n - 1),
  'all-to-all': lambda results, n: sum(x.bytes for x in results) * (n - 1) / n,
  'collective-permute': lambda results, n: sum(x.bytes for x in results),
  'collective-broadcast': lambda results, n: sum(x.bytes for x in results),
}


def sent(inst: Instruction, devices: int) -> tuple[str, float, tuple[int, ...]] | None:
  """(kind, bytes that a device sends, the first group of devices), if it is a collective."""
  if inst.op == 'send' and inst.find('(_xla_megascale_transfer_type)'):
    kind = inst.find(r'_xla_megascale_transfer_type="(\w+)"').lower().replace('_', '-')
    group = _over_slices(inst)
    return kind, inst.results[0].bytes * _SENT_BETWEEN_SLICES[kind](len(group)), group
  kind = inst.op.removesuffix('-start')
  # libtpu spreads one over the fusions that hide it; the first of its parts says where it starts.
  if kind not in _SENT or inst.find(r'"flag_start":"([^"]*)"') not in ('', '-1'):
    return None
  group = _group(inst.rest, devices)
  return kind, _SENT[kind](made(inst), len(group)), group


def made(inst: Instruction) -> tuple[Array, ...]:
  """The results; of what is only begun, without operands before them and flags behind them."""
  n = len(inst.operands)
  begun = inst.op.endswith('-start') and len(inst.results) > n
  return inst.results[n : 2 * n] if begun else inst.results


def _group(rest: str, devices: int) -> tuple[int, ...]:
  """The devices of the first group: a list, a tiling, or axes of a mesh."""
  if pairs := re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', rest):
    ways = [(int(a), int(b)) for a, b in re.findall(r'(\d+),(\d+)', pairs[1])]
    return next(((a, b) for a, b in ways if a != b), (0,))  # some keep what they have
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', rest)
  if listed:
    return tuple(map(int, listed[1].split(',')))
  tiled = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest)
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}', rest
  )
  if tiled:
    ids = _tiles(tiled[2], tiled[3]).reshape(_ints(tiled[1]))
    return tuple(map(int, ids[0]))
  if mesh:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    order = re.search(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', mesh[2] or '')
    ids = _tiles(order[1], order[2]) if order else np.arange(devices)
    ids = ids.reshape([int(n) for n in sizes.values()])
    axes = re.findall(r"'(\w+)'", mesh[3])
    index = tuple(slice(None) if axis in axes else 0 for axis in sizes)
    return tuple(map(int, ids[index].ravel()))
  return tuple(range(devices))


def _over_slices(inst: Instruction) -> tuple[int, ...]:
  """The first device of every slice, from a target like '{1,2}x{0:3}': slices, their devices."""
  slices, devices = re.search(r'_xla_megascale_target="{(.*?)}x{(.*?)}"', inst.rest).groups()
  return tuple(i * _count(devices) for i in range(_count(slices)))


def _count(listed: str) -> int:
  """Of '1,2' and of '0:1' there are two."""
  ends = [[int(n) for n in part.split(':')] for part in listed.split(',')]
  return sum(part[-1] - part[0] + 1 for part in ends)


def _ints(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


def _tiles(dims: str, order: str | None) -> np.ndarray:
  ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
  return ids.transpose(_ints(order)) if order else ids
