"""What an optimized XLA program computes, moves and sends, loops counted.

XLA's own `cost_analysis()` counts the body of a loop once, so it says little of a program that
scans its layers.  All numbers are those of one device.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from lmjax.hlo.text import Array, Computation, Computations, Instruction, parse


@dataclasses.dataclass(frozen=True)
class Cost:
  """What an instruction costs each time, how often it runs, and where it comes from."""

  kind: str
  amount: float
  times: int
  where: str  # like 'jit(step)/core/blocks/ffn/up/dot_general'
  group: tuple[int, ...] = ()  # of a collective: the devices of its first group

  @property
  def total(self) -> float:
    return self.amount * self.times


class Program:
  """What one device does in one run of a compiled program, as lists of costs.

  Attributes:
    products: FLOPs of matrix products, also of those that XLA leaves to a library.
    kernels: runs of kernels that are not XLA's, and whose FLOPs it does not know; each counts 1.
    moves: bytes of operands and results in the device's memory.  A slice counts as what it takes,
      an update in place as what it puts.  An estimate: what a kernel reads twice counts once.
    collectives: bytes sent, by rings: (n-1)/n of the array, twice that for an all-reduce.
    uncounted: loops of which nobody knows how often they run; they count once.
  """

  def __init__(self, text: str):
    self._computations, entry = parse(text)
    found = re.search(r'num_partitions=(\d+)', text)
    self._devices = int(found[1]) if found else 1
    self.products: list[Cost] = []
    self.kernels: list[Cost] = []
    self.moves: list[Cost] = []
    self.collectives: list[Cost] = []
    self.uncounted: list[str] = []
    self._walk(entry, 1)

  def _walk(self, name: str, times: int) -> None:
    computation = self._computations[name]
    for inst in computation.values():
      if inst.op in ('while', 'call', 'conditional', 'async-start'):
        for called in inst.called:  # of a conditional, all branches
          self._walk(called, times * (self._trips(inst) if inst.op == 'while' else 1))
        continue
      for inside, around in self._deep(inst, computation):
        self._count(inside, around, times)
      moved = _moved(inst, computation, self._computations)
      if moved:
        self.moves.append(Cost(inst.op, moved, times, _where(inst)))

  def _deep(
    self, inst: Instruction, around: Computation
  ) -> Iterator[tuple[Instruction, Computation]]:
    """The instruction, or those that are fused in it, each with the computation it stands in."""
    if inst.op != 'fusion':
      yield inst, around
      return
    for name in inst.called:
      for inside in self._computations[name].values():
        yield from self._deep(inside, self._computations[name])

  def _trips(self, inst: Instruction) -> int:
    known = inst.find(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    # libtpu does not write it down: its counters run from 0 to the constant they are compared with.
    condition = self._computations[inst.find(r'condition=%([\w.-]+)')]
    constants = [x.args for x in condition.values() if x.op == 'constant']
    if len(constants) != 1 or not constants[0].isdecimal():
      self.uncounted.append(inst.name)
      return 1
    return int(constants[0])

  def _count(self, inst: Instruction, around: Computation, times: int) -> None:
    kind, where = inst.op.removesuffix('-start'), _where(inst)
    if inst.op == 'dot' or inst.target.startswith('__cublas$'):
      self.products.append(Cost('dot', _dot_flops(inst, around), times, where))
    elif inst.op == 'convolution':
      self.products.append(Cost('convolution', _convolution_flops(inst, around), times, where))
    elif inst.target in _KERNELS or inst.target.startswith('__cudnn$'):
      self.kernels.append(Cost(inst.target, 1, times, where))
    elif inst.op == 'send' and inst.find('(_xla_megascale_transfer_type)'):
      group = _over_slices(inst)
      kind = inst.find(r'_xla_megascale_transfer_type="(\w+)"').lower().replace('_', '-')
      self.collectives.append(
        Cost(
          kind, inst.results[0].bytes * _SENT_BETWEEN_SLICES[kind](len(group)), times, where, group
        )
      )
    # libtpu spreads one over the fusions that hide it; the first of its parts says where it starts.
    elif kind in _SENT and inst.find(r'"flag_start":"([^"]*)"') in ('', '-1'):
      group = _group(inst.rest, self._devices)
      sent = _SENT[kind](_made(inst), len(group))
      self.collectives.append(Cost(kind, sent, times, where, group))


def _where(inst: Instruction) -> str:
  return inst.find(r'op_name="([^"]*)"')


# -------------------------------------------------------------------------------------- products

_KERNELS = ('tpu_custom_call', '__gpu$xla.gpu.triton', 'triton_kernel_call')


def _dot_flops(inst: Instruction, around: Computation) -> float:
  left = around[inst.operands[0]].results[0].dims
  contracted = inst.find(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
  inner = math.prod(left[int(i)] for i in re.findall(r'\d+', contracted))
  return 2 * math.prod(inst.results[0].dims) * inner


def _convolution_flops(inst: Instruction, around: Computation) -> float:
  """TPUs' products are convolutions; what meets nothing but padding is not computed."""
  left, kernel = (around[name].results[0].dims for name in inst.operands[:2])
  lhs, rhs, out = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', inst.rest).groups()
  outer = math.prod(n for n, label in zip(inst.results[0].dims, out, strict=True) if label in 'bf')
  inner = kernel[rhs.index('i')]
  window = {
    key: value.split('x')
    for key, value in re.findall(r'(\w+)=([\dx_-]+)', inst.find(r'window=\{([^}]*)\}'))
  }
  pairs = 1
  for i, size in enumerate(map(int, window.get('size', []))):
    of = lambda key, default: window[key][i] if key in window else default  # noqa: B023
    low, _ = map(int, of('pad', '0_0').split('_'))
    stride, spread, apart = (int(of(key, 1)) for key in ('stride', 'lhs_dilate', 'rhs_dilate'))
    places = inst.results[0].dims[out.index(str(i))]
    at = np.arange(places)[:, None] * stride + np.arange(size)[None] * apart - low
    pairs *= int(
      np.sum((at >= 0) & (at <= (left[lhs.index(str(i))] - 1) * spread) & (at % spread == 0))
    )
  return 2 * outer * inner * pairs


# ----------------------------------------------------------------------------------------- moves

_FREE = {  # they move nothing, or what they do move is counted elsewhere
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'iota'),
  *('partition-id', 'replica-id', 'optimization-barrier', 'async-done', 'async-update'),
  *('AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound', 'Sharding'),
}


def _moved(inst: Instruction, around: Computation, others: Computations) -> float:
  """Bytes that an instruction reads from the device's memory and writes to it."""
  if inst.op in _FREE or inst.target in _FREE or inst.op.endswith('-done'):
    return 0
  if inst.op in ('send', 'recv'):
    return inst.results[0].bytes
  if inst.op == 'copy-start':
    return sum(x.bytes for x in inst.results[:2] if not x.space)
  if inst.op == 'slice-start':
    source, part = inst.results[0], inst.results[-2]
    return part.bytes * ((not source.space) + (not part.space))
  read = sum(
    _read(inst, i, around, others)
    for i, name in enumerate(inst.operands)
    if not any(x.space for x in around[name].results)
  )
  written = [
    size
    for x, size in zip(inst.results, _written(inst, around, others), strict=True)
    if not x.space
  ]
  return read + sum(written)


def _size(name: str, around: Computation) -> float:
  return sum(x.bytes for x in around[name].results)


def _read(inst: Instruction, i: int, around: Computation, others: Computations) -> float:
  """Bytes that an instruction needs of its i-th operand."""
  whole = _size(inst.operands[i], around)
  if inst.op in ('dynamic-slice', 'slice', 'gather') and i == 0:
    return inst.results[0].bytes
  if inst.op == 'dynamic-update-slice' and i == 0:
    return 0
  if inst.op == 'scatter' and i == 0:
    return _size(inst.operands[2], around)
  if inst.op != 'fusion':
    return whole
  inside = others[inst.called[0]]
  inputs = {int(x.args): x.name for x in inside.values() if x.op == 'parameter'}
  return min(whole, _read_inside(inputs[i], inside, others))


def _read_inside(name: str, inside: Computation, others: Computations) -> float:
  total = 0.0
  for user in inside.values():
    for i, operand in enumerate(user.operands):
      if operand == name:
        alias = user.op == 'bitcast'
        total += (
          _read_inside(user.name, inside, others) if alias else _read(user, i, inside, others)
        )
  return total


def _written(inst: Instruction, around: Computation, others: Computations) -> list[float]:
  """Bytes of each result that are not there already."""
  if inst.op in ('dynamic-update-slice', 'scatter'):
    return [_size(inst.operands[1 if inst.op == 'dynamic-update-slice' else 2], around)]
  if inst.op == 'bitcast' and inst.operands[0] in around:
    return _written(around[inst.operands[0]], around, others)
  if inst.op == 'tuple':
    return [size for name in inst.operands for size in _written(around[name], around, others)]
  if inst.op == 'fusion' and inst.called:
    inside = others[inst.called[0]]
    return _written(next(reversed(inside.values())), inside, others)
  return [x.bytes for x in inst.results]


# ----------------------------------------------------------------------------------- collectives


def _made(inst: Instruction) -> tuple[Array, ...]:
  """The results without the operands that stand before them where it is only begun."""
  n = len(inst.operands)
  begun = inst.op.endswith('-start') and len(inst.results) > n
  return inst.results[n : 2 * n] if begun else inst.results


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
  'collective-permute': lambda results, n: results[0].bytes,
  'collective-broadcast': lambda results, n: results[0].bytes,
}


def _group(rest: str, devices: int) -> tuple[int, ...]:
  """The devices of the first group: a list, a tiling, or axes of a mesh."""
  listed = re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', rest)
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
