"""An optimized XLA program, read from its text into computations, which are lists of instructions.

The text is what `jax.stages.Compiled.as_text()` gives.
"""

import dataclasses
import functools
import math
import re


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of the program, and how it lies in memory, like '{1,0:T(8,128)(2,1)S(1)}'."""

  dtype: str
  dims: tuple[int, ...]
  layout: str

  @property
  def bytes(self) -> float:
    return math.prod(self.dims) * self._item

  @functools.cached_property
  def padded(self) -> float:
    """The bytes it takes: the last dimensions in memory are filled up to whole tiles."""
    order = re.match(r'\{([\d,]+)', self.layout)
    tile = re.search(r':T\(([\d,]+)\)', self.layout)
    sizes = [self.dims[int(i)] for i in order[1].split(',')] if order else list(self.dims)
    for i, n in enumerate(reversed(tile[1].split(',')) if tile else ()):
      sizes[i : i + 1] = [-(-size // int(n)) * int(n) for size in sizes[i : i + 1]]
    return math.prod(sizes) * self._item

  @property
  def _item(self) -> float:
    bits = re.search(r'\d+', self.dtype)  # of the others, only pred has a size
    return int(bits[0]) / 8 if bits else self.dtype == 'pred'

  @functools.cached_property
  def space(self) -> int:
    """0 is the memory of the device; others are on the chip, or a host's."""
    found = re.search(r'S\((\d+)\)', self.layout)
    return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  op: str
  results: tuple[Array, ...]
  args: str
  rest: str  # the attributes

  @functools.cached_property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.-]+)', self.args)

  @functools.cached_property
  def called(self) -> list[str]:
    """The computations that run when this does."""
    keys = r'(?:calls|to_apply|body|\w+_computations?)=\{?((?:%[\w.-]+(?:, )?)+)'
    return re.findall(r'%([\w.-]+)', ' '.join(re.findall(keys, self.rest)))

  def find(self, pattern: str) -> str:
    """The first group of the pattern in the attributes, or ''."""
    found = re.search(pattern, self.rest)
    return found[1] if found else ''

  @property
  def target(self) -> str:
    """What a custom call calls."""
    return self.find(r'custom_call_target="([^"]*)"')


# Instructions that run whole computations.
RUN = ('while', 'call', 'call-start', 'conditional', 'async-start')
Computation = dict[str, Instruction]  # by name, in the order in which they run
Computations = dict[str, Computation]


def parse(text: str) -> tuple[Computations, str]:
  """(all computations, the name of the one that is the program)."""
  computations, entry, current = {}, '', {}
  # Some attributes hold line ends, so that a line is what begins like one.
  for line in re.split(r'\n(?=  (?:ROOT )?%|%|ENTRY|\}\n)', text):
    header = re.match(r'(ENTRY )?%([\w.-]+) \(', line)
    if header:
      current = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif line.startswith('  '):
      inst = _instruction(line)
      current[inst.name] = inst
  return computations, entry


def _instruction(line: str) -> Instruction:
  head = re.match(r'  (?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(', line)
  (name, shapes, op), begin = head.groups(), head.end()
  depth, end = 1, begin
  while depth:
    depth += {'(': 1, ')': -1}.get(line[end], 0)
    end += 1
  found = re.findall(r'([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?', shapes)
  arrays = tuple(
    Array(dtype, tuple(int(n.lstrip('<=')) for n in dims.split(',') if n), layout)
    for dtype, dims, layout in found
  )
  return Instruction(name, op, arrays, line[begin : end - 1], line[end:])
