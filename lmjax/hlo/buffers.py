"""What lies in a device's memory when a program needs most of it, besides its arguments.

XLA's own assignment of buffers does not come with a program for a TPU.  This one follows the order
of the instructions, in which a buffer lives from the one that makes it to the last that reads it.
"""

import collections
import dataclasses

from lmjax.hlo.text import RUN, Array, Computation, Computations, Instruction, parse


@dataclasses.dataclass(eq=False)
class Buffer:
  array: Array
  where: str  # like 'jit(step)/core/blocks/ffn/up/dot_general'

  @property
  def bytes(self) -> float:
    return self.array.padded


_Value = list[Buffer | None]  # of each result; None where it is an argument's or not in memory


def at_peak(text: str) -> list[Buffer]:
  """The temporaries that are alive when they are largest together, the largest first."""
  computations, entry = parse(text)
  return sorted(_peak(entry, computations), key=lambda buffer: -buffer.bytes)


def _peak(name: str, others: Computations) -> list[Buffer]:
  computation = others[name]
  values: dict[str, _Value] = {}
  for inst in computation.values():
    values[inst.name] = _value(inst, values, computation, others)
  # What it returns lies where its caller wants it: in the arguments, or in what a loop carries.
  returned = set(values[next(reversed(computation))])
  dies = {b: inst for inst in computation.values() for n in inst.operands for b in values[n]}
  alive: set[Buffer] = set()
  peak: list[Buffer] = []
  ends = collections.defaultdict(list)
  for buffer, inst in dies.items():
    ends[inst.name].append(buffer)
  for inst in computation.values():
    alive |= {b for b in values[inst.name] if b in dies and b not in returned and b is not None}
    inside = [b for called in _runs(inst) for b in _peak(called, others)]
    if sum(b.bytes for b in alive) + sum(b.bytes for b in inside) > sum(b.bytes for b in peak):
      peak = [*alive, *inside]
    alive.difference_update(ends[inst.name])
  return peak


def _runs(inst: Instruction) -> list[str]:
  return inst.called if inst.op in RUN else []


def _value(
  inst: Instruction, values: dict[str, _Value], around: Computation, others: Computations
) -> _Value:
  operands = [values[name] for name in inst.operands]
  if inst.op in ('parameter', 'constant', 'partition-id', 'replica-id'):
    return [None] * len(inst.results)
  if inst.op == 'tuple':
    return [buffer for value in operands for buffer in value]
  if inst.op == 'while':
    body = others[inst.find(r'body=%([\w.-]+)')]
    for buffer, name in zip(operands[0], next(reversed(body.values())).operands, strict=True):
      if buffer and (made_by := _put_by(body[name], body, others)):
        buffer.where = made_by
  if inst.op in ('while', 'bitcast', 'opt-barrier'):
    return operands[0]
  if inst.op == 'get-tuple-element':
    return [operands[0][int(inst.find(r'index=(\d+)'))]]
  if inst.op.endswith('-done'):
    left = [b for b in reversed(operands[0]) if b]  # what was begun with comes first
    ours = []
    for array in inst.results:
      ours.append(next((b for b in left if b.array.dims == array.dims), None))
      left = [b for b in left if b is not ours[-1]]
    return ours
  made: _Value = []
  for i, array in enumerate(inst.results):
    read = i - (inst.op == 'copy-start')
    if inst.op.endswith('-start') and 0 <= read < len(operands):
      made.append(operands[read][0])  # what is read, until all of it has been
      continue
    place = _in_place(inst, i, around, others)
    buffer = Buffer(array, inst.find(r'op_name="([^"]*)"')) if array.space == 0 else None
    made.append(values[place][0] if place else buffer)
  return made


def _in_place(inst: Instruction, i: int, around: Computation, others: Computations) -> str | None:
  """The operand that the i-th result overwrites in part."""
  root = inst
  if inst.op == 'fusion':
    inside = others[inst.called[0]]
    root = inside[next(reversed(inside))]
    if root.op == 'tuple':
      root = inside[root.operands[i]]
    while root.op == 'bitcast':
      root = inside[root.operands[0]]
  if root.op not in ('dynamic-update-slice', 'scatter'):
    return None
  array = inst.results[i]
  same = lambda name: around[name].results[0] == array
  return next(filter(same, inst.operands), None)


def _put_by(inst: Instruction, around: Computation, others: Computations) -> str:
  """Where that comes from which a turn of a loop puts into what it carries: a layer's activations.

  Otherwise it would be called after the zeros that it was at first.
  """
  outside, index = {}, 0
  if inst.op == 'get-tuple-element':
    inst, index = around[inst.operands[0]], int(inst.find(r'index=(\d+)'))
  if inst.op == 'fusion':
    inside = others[inst.called[0]]
    outside = {x.name: inst.operands[int(x.args)] for x in inside.values() if x.op == 'parameter'}
    inst, around, caller = next(reversed(inside.values())), inside, around
    inst = inside[inst.operands[index]] if inst.op == 'tuple' else inst
  while inst.op in ('bitcast', 'copy'):
    inst = around[inst.operands[0]]
  if inst.op != 'dynamic-update-slice':
    return ''
  made = around[inst.operands[1]]
  while made.op in ('bitcast', 'copy', 'reshape', 'parameter', 'get-tuple-element'):
    if made.op != 'parameter':
      made = around[made.operands[0]]
    elif made.name in outside:
      made, around, outside = caller[outside[made.name]], caller, {}
    else:
      return ''
  return made.find(r'op_name="([^"]*)"')
