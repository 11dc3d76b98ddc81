"""A hundred steps of AdamW beside torch, drawn: tests/parity/trajectory_test.py as a picture.

python -m tests.benchmarks.trajectory --out FILE.svg

It needs pip install -e '.[parity]'.  Above are both losses of a GPT-2 and a BERT with the same
weights and batches, theirs dashed over ours; below, how far they are apart, over the loss, and the
limit of the test.  The largest difference and the last losses are printed.
"""

import argparse
import html
import json
import math
import pathlib
import tempfile
from collections.abc import Iterator

from tests.parity import models_test as models
from tests.parity import trajectory_test as trajectory

WIDTH, HEIGHT, LEFT, TOP, GAP = 440, 190, 60, 30, 50
LEAST = 1e-9  # what is drawn for two equal losses, on a logarithmic scale
Curve = list[float]


def both(kind: str) -> tuple[Curve, Curve]:
  """(our losses, torch's)."""
  with tempfile.TemporaryDirectory() as scratch:
    theirs = models.widened(models.make(kind, trajectory.SIZE))
    theirs.save_pretrained(scratch)
    ours, schedule = trajectory.of_ours(kind, pathlib.Path(scratch))
    return ours, trajectory.of_torch(kind, theirs, schedule)


def panel(
  title: str, curves: list[tuple[Curve, str]], low: float, high: float, x: int, y: int
) -> Iterator[str]:
  """The elements of a box from `low` to `high` with curves in it, each drawn in its style."""
  down = lambda value: y + HEIGHT * (high - value) / (high - low)
  yield f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>'
  yield f'<text x="{x}" y="{y - 8}">{html.escape(title)}</text>'
  for value in (low, high):
    yield f'<text x="{x - 6}" y="{down(value) + 4}" text-anchor="end">{value:g}</text>'
  for curve, style in curves:
    across = WIDTH / (len(curve) - 1)
    points = ' '.join(f'{x + across * i:.1f},{down(v):.1f}' for i, v in enumerate(curve))
    yield f'<polyline points="{points}" fill="none" {style}/>'


def drawn(losses: dict[str, tuple[Curve, Curve]]) -> str:
  styles = ('stroke="#1f77b4" stroke-width="3"', 'stroke="#ff7f0e" stroke-dasharray="5 4"')
  elements = []
  for column, (kind, (ours, theirs)) in enumerate(losses.items()):
    x = LEFT + column * (WIDTH + LEFT)
    low, high = math.floor(min(ours + theirs)), math.ceil(max(ours + theirs))
    title = f'{kind}: loss, ours and torch’s (dashed), steps 1 to {len(ours)}'
    elements += panel(title, list(zip((ours, theirs), styles, strict=True)), low, high, x, TOP)
    apart = [math.log10(max(d, LEAST)) for d in differences(ours, theirs)]
    limit = [math.log10(trajectory.LIMIT)] * len(apart)
    curves = [(apart, 'stroke="#333"'), (limit, 'stroke="#d62728" stroke-dasharray="2 3"')]
    y = TOP + HEIGHT + GAP
    elements += panel('log10 of |difference| / loss; the limit', curves, -9, -3, x, y)
  size = f'width="{LEFT + len(losses) * (WIDTH + LEFT)}" height="{TOP + 2 * HEIGHT + GAP + 20}"'
  font = 'font-family="sans-serif" font-size="12"'
  return '\n'.join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>', *elements, '</svg>'])


def differences(ours: Curve, theirs: Curve) -> Curve:
  return [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--out', required=True, type=pathlib.Path)
  a = parser.parse_args()
  losses = {kind: both(kind) for kind in ('gpt2', 'bert')}
  for kind, (ours, theirs) in losses.items():
    said = {'first': ours[0], 'last': ours[-1], "torch's last": theirs[-1]}
    print(kind, json.dumps(said | {'largest difference / loss': max(differences(ours, theirs))}))
  a.out.write_text(drawn(losses), encoding='utf-8')


if __name__ == '__main__':
  main()
