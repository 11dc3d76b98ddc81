"""What an optimized XLA program computes, moves and sends, loops counted.

XLA's own `cost_analysis()` counts the body of a loop once, so it says little of a program that
scans its layers.  All numbers are those of one device.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from lmjax.hlo import collectives
from lmjax.hlo.text import RUN, Computation, Computations, Instruction, parse


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
      if inst.op in RUN:
        again = self._trips(inst, computation) if inst.op == 'while' else 1
        for called in inst.called:  # of a conditional, all branches
          self._walk(called, times * again)
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

  def _trips(self, loop: Instruction, around: Computation) -> int:
    known = loop.find(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    # libtpu does not write it down: a counter runs from a constant to the one that it is compared
    # with.  It begins with 1 where the first turn stands before the loop, and goes by 2 where two
    # turns are made one.
    condition, body = (
      self._computations[loop.find(rf'{name}=%([\w.-]+)')] for name in ('condition', 'body')
    )
    compared = [condition[name] for name in next(reversed(condition.values())).operands]
    index = next((x.find(r'index=(\d+)') for x in compared if x.op == 'get-tuple-element'), '')
    carried = around[loop.operands[0]]
    begin = around[carried.operands[int(index)]] if index and carried.op == 'tuple' else carried
    while begin.op == 'copy':
      begin = around[begin.operands[0]]
    ends = [x.args for x in condition.values() if x.op == 'constant']
    if begin.op != 'constant' or len(ends) != 1 or not (begin.args + ends[0]).isdecimal():
      self.uncounted.append(loop.name)
      return 1
    after = body[next(reversed(body.values())).operands[int(index)]]
    steps = [int(body[x].args) for x in after.operands if body[x].op == 'constant']
    return -(-(int(ends[0]) - int(begin.args)) // (steps[0] if after.op == 'add' and steps else 1))

  def _count(self, inst: Instruction, around: Computation, times: int) -> None:
    where = _where(inst)
    if inst.op == 'dot' or inst.target.startswith('__cublas$'):
      self.products.append(Cost('dot', _dot_flops(inst, around), times, where))
    elif inst.op == 'convolution':
      self.products.append(Cost('convolution', _convolution_flops(inst, around), times, where))
    elif inst.target in _KERNELS or inst.target.startswith('__cudnn$'):
      self.kernels.append(Cost(inst.target, 1, times, where))
    elif sent := collectives.sent(inst, self._devices):
      kind, size, group = sent
      self.collectives.append(Cost(kind, size, times, where, group))


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
  *('partition-id', 'replica-id', 'opt-barrier', 'async-done', 'async-update'),
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
  if inst.op.endswith('-start'):
    return read + sum(x.bytes for x in collectives.made(inst) if not x.space)
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
