"""The plots of a study, as SVG: curves of the loss, and the differences with their intervals.

They are small, so that their letters can be read on a telephone, on light and on dark paper.
"""

import io
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lmjax.ablate import numbers
from lmjax.ablate.content import Study

Line = tuple[np.ndarray, np.ndarray]  # x, y

INK = '#010203'  # stands for the colour of the text around the plot
# The reference is drawn in ink, the others as Okabe and Ito (2008) chose for all kinds of eyes:
# those of their colours that have a contrast of 3 to white and to nearly black.
COLOURS = (INK, '#0072b2', '#d55e00', '#009e73', '#cc79a7')
DASHES = ('', '6 2', '1.5 1.5', '7 2 1.5 2')  # by turns, when there are more arms than colours
OUTCOMES = {'better': '#0072b2', 'worse': '#d55e00', 'diverged': '#d55e00'}
AXES = {'tokens': 'tokens', 'flops': 'FLOPs', 'seconds': 'time of training'}
UNITS = {'seconds': 1, 'minutes': 60, 'hours': 3600}  # each from 2 of them on
POINTS = 120  # of a curve
EARLY = 0.2  # of a curve, which may leave the plot at the top
WIDTH, LETTERS = 4.0, 46  # inches; letters that they have room for
STYLE = {
  'svg.fonttype': 'none',
  'font.size': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.linewidth': 0.6,
  'axes.grid': True,
  'grid.alpha': 0.15,
  'grid.linewidth': 0.6,
  **dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor'), INK),
  **dict.fromkeys(('xtick.color', 'ytick.color', 'grid.color'), INK),
}


def curves(study: Study, axis: str) -> str:
  """The loss against tokens, flops or seconds; '' where there is none.

  Where all seeds of an arm have data: their mean, and a band from the lowest to the highest.  What
  some of them have beyond that: a thin line for each.
  """
  name = f'loss-{axis}'
  with _style(name):
    figure = Figure(figsize=(WIDTH, 2.8), layout='constrained')
    axes, drawn = figure.add_subplot(), []
    for n, arm in enumerate(study['arms']):
      seeds = _lines(study['curves'].get(arm['name'], {}).values(), axis)
      drawn += _draw(axes, seeds, *_look(n)) if seeds else []
    if not drawn:
      return ''
    _zoom(axes, drawn)
    _name_axes(axes, axis, max(x[-1] for x, _ in drawn))
    names = ', '.join(arm['name'] for arm in study['arms'])
    return _svg(figure, f'Loss against {AXES[axis]}: {names}')


def forest(study: Study) -> str:
  """The comparisons, one below the other; '' where there is none."""
  found = [c for c in study['comparisons'] if c['difference'] is not None]
  if not found:
    return ''
  labels = [_label(study, comparison) for comparison in found]
  lines = sum(len(label) + 1.6 for label in labels) + 0.2
  below, line = 0.55, 0.165  # inches
  height = below + line * lines
  words = {'@0': ', '.join(filter(None, ['difference', study['unit']]))}
  with _style('forest'):
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.05, below / height, 0.9, line * lines / height))
    place = 0.2
    for n, (comparison, label) in enumerate(zip(found, labels, strict=True)):
      for m, part in enumerate(label):
        words[f'@{n}.{m}'] = part
        at = {'transform': axes.get_yaxis_transform(), 'va': 'top'}
        axes.text(-0.04, place + m, f'@{n}.{m}', **at)
      place += len(label) + 1.6
      _interval(axes, comparison, place - 1.0, study['margin'])
    axes.set(ylim=(lines, 0), yticks=[])
    axes.grid(False)
    axes.spines['left'].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    ends = (
      ['← better', '@0', 'worse →'] if study['lower_is_better'] else ['← worse', '@0', 'better →']
    )
    for x, end, side in zip((0, 0.5, 1), ends, ('left', 'center', 'right'), strict=True):
      axes.annotate(end, (x, 0), (0, -32), 'axes fraction', 'offset points', ha=side)
    title = f'Differences in {study["metric"]}: ' + '; '.join(map(' '.join, labels))
    return _svg(figure, title, words)


def swatch(n: int) -> str:
  """A piece of the line of arm n, for a legend."""
  colour, dashes = _look(n)
  return (
    '<svg viewBox="0 0 32 8" width="32" height="8" aria-hidden="true"><path d="M1 4H31" '
    f'fill="none" stroke="{colour.replace(INK, "currentColor")}" stroke-width="2.5" '
    f'stroke-dasharray="{dashes}" /></svg>'
  )


# ---------------------------------------------------------------------------------------- drawing


def _style(name: str) -> Any:
  """What matplotlib takes from nowhere else; the names of its parts differ from plot to plot."""
  return matplotlib.style.context(['default', STYLE | {'svg.hashsalt': name}])


def _look(n: int) -> tuple[str, str]:
  """Colour and dashes of arm n."""
  turn, colour = divmod(n, len(COLOURS))
  return COLOURS[colour], DASHES[turn % len(DASHES)]


def _lines(seeds: Iterable[Mapping[str, Any]], axis: str) -> list[Line]:
  """Of each seed with any, the finite part."""
  found = []
  for seed in seeds:
    x, y = np.array([seed[axis], seed['loss']], np.float64)  # None is no number, and so is nan
    known = np.isfinite(x) & np.isfinite(y)
    found += [(x[known], y[known])] if known.sum() > 1 else []
  return found


def _draw(axes: Axes, seeds: list[Line], colour: str, dashes: str) -> list[Line]:
  """Draws an arm; returns what is drawn with strong lines."""
  first, last = max(x[0] for x, _ in seeds), min(x[-1] for x, _ in seeds)
  dash = (0, [float(x) for x in dashes.split()]) if dashes else 'solid'
  look = {'color': colour, 'linestyle': dash}
  for x, y in seeds:
    begin = max(last, x[0])
    if x[-1] > begin:
      share = (x[-1] - begin) / (x[-1] - x[0])
      rest = np.linspace(begin, x[-1], 2 + round(share * POINTS))
      axes.plot(rest, np.interp(rest, x, y), linewidth=0.6, alpha=0.8, **look)
  if first >= last:
    return []
  grid = np.linspace(first, last, POINTS)
  values = np.stack([np.interp(grid, x, y) for x, y in seeds])
  if len(seeds) > 1:
    band = values.min(axis=0), values.max(axis=0)
    axes.fill_between(grid, *band, color=colour, alpha=0.18, linewidth=0)
  axes.plot(grid, values.mean(axis=0), linewidth=1.4, **look)
  return [(grid, values.mean(axis=0))]


def _zoom(axes: Axes, lines: list[Line]) -> None:
  """To what comes after the first fall of the loss, in which all arms look alike."""
  end = max(x[-1] for x, _ in lines)
  late = [y[x >= EARLY * end] for x, y in lines if x[-1] > EARLY * end]
  low, high = min(y.min() for y in late), max(y[0] for y in late)
  if high > low:
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _name_axes(axes: Axes, axis: str, end: float) -> None:
  axes.set_ylabel('loss')
  axes.set_xlabel(AXES[axis])
  axes.xaxis.set_major_locator(MaxNLocator(5))
  axes.xaxis.set_major_formatter(EngFormatter(sep=''))
  if axis == 'seconds':
    unit = max((name for name in UNITS if 2 * UNITS[name] <= end), key=UNITS.get, default='seconds')
    ticks = MaxNLocator(5).tick_values(0, end / UNITS[unit])
    axes.set_xticks(ticks * UNITS[unit], [f'{x:g}' for x in ticks])
    axes.set_xlim(0, 1.02 * end)
    axes.set_xlabel(f'{unit} of training')


def _label(study: Study, comparison: Mapping[str, Any]) -> list[str]:
  """In lines that fit; names are broken between the values that they are of."""
  _, name = comparison['arms']
  difference = numbers.difference(study, comparison)
  whole = f'{name}: {difference}'
  narrow = textwrap.wrap(name.replace(',', ', '), LETTERS)
  return [whole] if len(whole) <= LETTERS else [*narrow, difference]


def _interval(axes: Axes, comparison: Mapping[str, Any], y: float, margin: float) -> None:
  around = [y - 0.55, y + 0.55]
  axes.fill_betweenx(around, -margin, margin, color=INK, alpha=0.13, linewidth=0)
  axes.plot([0, 0], around, color=INK, linewidth=0.8)
  colour = OUTCOMES.get(comparison['outcome'], INK)
  if comparison['interval']:
    axes.plot(comparison['interval'], [y, y], color=colour, linewidth=2)
  face = 'none' if comparison['outcome'] in ('inconclusive', 'unknown') else colour
  point = {'marker': 'o', 'markersize': 6, 'markerfacecolor': face, 'markeredgewidth': 1.5}
  axes.plot([comparison['difference']], [y], color=colour, **point)


# -------------------------------------------------------------------------------------------- SVG


def _svg(figure: Figure, title: str, words: Mapping[str, str] | None = None) -> str:
  """`words` take the place of what was drawn for them.

  matplotlib would read $ in a name as mathematics, and warn of letters that its font has not.
  """
  file = io.StringIO()
  figure.savefig(file, format='svg', transparent=True, metadata={'Date': None})
  text = file.getvalue()
  root = ElementTree.fromstring(text)
  for element in root.iter():
    element.tag = element.tag.rpartition('}')[2]
    element.attrib = {
      key.rpartition('}')[2]: _tidy(key, value)
      for key, value in element.attrib.items()
      if key != 'id' or f'#{value}' in text
    }
    element.text = (words or {}).get(element.text, element.text)
    for child in list(element):
      if child.tag.endswith(('}metadata', '}style')):  # of it, and of the page around it
        element.remove(child)
  root.attrib |= {'xmlns': 'http://www.w3.org/2000/svg', 'role': 'img', 'aria-label': title}
  root.attrib['stroke-linejoin'] = 'round'
  return ElementTree.tostring(root, 'unicode')


def _tidy(key: str, value: str) -> str:
  if key == 'd':
    return re.sub(r'\s+', ' ', re.sub(r'\d+\.\d+', lambda x: f'{float(x[0]):.1f}', value)).strip()
  value = re.sub(r"('[^']*', )+sans-serif", 'system-ui, sans-serif', value)
  return value.replace(INK, 'currentColor')
