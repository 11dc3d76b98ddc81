"""How far our numbers are from those of `transformers`, model by model, as a table.

python -m tests.benchmarks.parity

It needs pip install -e '.[parity]'.  Weights are drawn wide, as in tests/parity/models_test.py.  Of
logits, hidden states, pooled vectors and classes it is the largest difference; of gradients that of
any parameter, over the largest number of the same parameter's.
"""

import pathlib
import tempfile

import numpy as np

from tests.parity import models_test as models

HEAD = (
  'model',
  'layers, dims, heads',
  'logits',
  'hidden',
  'pooled',
  'classes',
  'loss',
  'gradients',
)


def row(kind: str, size: tuple[int, ...]) -> list[str]:
  with tempfile.TemporaryDirectory() as scratch:
    pair = models.paired(kind, size, pathlib.Path(scratch))
    said = {name: np.abs(a - b).max() for name, (a, b) in models.outputs(pair).items()}
    (ours, theirs), beside = models.gradients(pair)
  gradients = max(np.abs(a - b).max() / scale for a, b, scale in beside.values())
  numbers = [said.get(name) for name in HEAD[2:6]] + [abs(ours - theirs) / theirs, gradients]
  return [kind, ', '.join(map(str, size[:3])), *('' if x is None else f'{x:.0e}' for x in numbers)]


def main() -> None:
  for cells in (HEAD, ['---'] * len(HEAD)):
    print(f'| {" | ".join(cells)} |')
  for kind in models.KINDS:
    for size in models.SIZES:
      print(f'| {" | ".join(row(kind, size))} |', flush=True)


if __name__ == '__main__':
  main()
