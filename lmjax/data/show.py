"""Rows of a batch, token by token, and tables, for a terminal or as a page of HTML.

It knows no objective: what it shows is what stands under the keys of a batch that all of them share
(`objectives/__init__.py`), and what stands under other keys is shown as it is.

Nothing of a text reaches a terminal or browser but letters: what controls either is spelt.
"""

import html
import itertools
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lmjax.data.pieces import Tokenizer
from lmjax.data.statistics import Table, fates_of

# kind of text -> how a terminal (SGR) and a browser (CSS, on white and on black) show it
STYLES = {
  'head': ('1', 'font-weight: bold'),
  'special': ('35', 'color: #a5d'),
  'masked': ('30;43', 'background: #fb08'),
  'random': ('30;41', 'background: #f448'),
  'kept': ('30;42', 'background: #3c58'),
  'faint': ('2', 'opacity: .5'),
}
MEANINGS = {  # of the signs in a row
  'masked': '[MASK] over what was there',
  'random': 'a random token over ≠ and what was there',
  'kept': 'one that is kept over = and itself',
  '×': 'what stands before × is the weight of a target',
  '␣': '␣ is a space',
  '↵': '↵ is a line feed',
  '⇥': '⇥ is a tab',
  '<>': '<17> is the id of what is no text by itself',
}
_SPELT = {' ': '␣', '\n': '↵', '\t': '⇥', '\x7f': '␡'}
_KNOWN = ('tokens', 'targets', 'weights', 'segments', 'positions', 'types')
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.4 sans-serif; margin: 1em }}
h1 {{ font-size: 1.3em; overflow-wrap: anywhere }} h2 {{ font-size: 1.1em }}
.cells {{ font-family: monospace; overflow-wrap: anywhere }}
.cells span {{ display: inline-flex; flex-direction: column; vertical-align: top; max-width: 100% }}
.cells span {{ border-left: 1px solid #8886; min-height: 2.8em; margin-bottom: .4em }}
.cells span > * {{ padding: 0 2px; unicode-bidi: isolate }}
b {{ font-weight: normal }} i {{ font-style: normal; opacity: .75 }} p {{ margin: .4em 0 }}
.wide {{ overflow-x: auto }} td, th {{ padding: 1px .4em; text-align: right; vertical-align: top }}
td:first-child, th:first-child {{ text-align: left; padding-left: 0 }}
td {{ white-space: nowrap }}
{styles}
</style>
<h1>{title}</h1>
"""


class Cell(NamedTuple):
  """A place of a row, or several in a row that are alike."""

  text: str
  below: str  # what is predicted there; '' if nothing is
  kind: str  # a key of STYLES, or ''
  where: str  # its number and the token's id


class Block(NamedTuple):
  """Places of one segment and type, with positions one after the other."""

  about: str
  cells: list[Cell]


class Row(NamedTuple):
  blocks: list[Block]
  notes: list[str]  # what belongs to no place
  signs: frozenset[str] = frozenset()  # keys of MEANINGS, and the NAME_ of classes


def visible(text: str) -> str:
  """The text with a sign for every character that is none: controls, marks of direction, space."""

  def one(c: str) -> str:
    if c < ' ' and c not in _SPELT:
      return chr(0x2400 + ord(c))
    odd = unicodedata.category(c)[0] in 'CZ'
    return _SPELT.get(c) or (f'<U+{ord(c):04X}>' if odd else c)

  return ''.join(map(one, text))


def spell(tokenizer: Tokenizer, i: int) -> str:
  """A token by itself: its text, or as the vocabulary calls it where that says more."""
  by_name = tokenizer.special[i] or not tokenizer.lossless
  text = tokenizer.pieces[i] if by_name else tokenizer.decode([i])
  return visible(text) if text and '\ufffd' not in text else f'<{i}>'


def row(batch: Mapping[str, np.ndarray], number: int, tokenizer: Tokenizer) -> Row:
  """Everything that a batch holds of one of its rows."""
  own = {key: value[number] for key, value in batch.items()}
  tokens, below, notes = own['tokens'], [[] for _ in own['tokens']], []
  kinds = np.where(tokenizer.special[tokens], 'special', '').astype('<U7')
  predictions = [key for key in own if key.endswith('places')]
  known = {*_KNOWN, *predictions}
  if 'places' not in own:
    for at, weight, target in zip(below, own['weights'], own['targets'], strict=True):
      at.append(_weighed(weight, spell(tokenizer, target)))
  for key in predictions:
    name = key.removesuffix('places')
    targets, weights = own[f'{name}targets'], own[f'{name}weights']
    known |= {f'{name}targets', f'{name}weights'}
    real = np.flatnonzero(weights)
    notes.append(f'{key}: {len(real)} of {len(weights)} are used, the others weigh 0')
    for slot in real.tolist():
      place, target = own[key][slot], targets[slot]
      what = f'{name}{target}'
      if not name:
        kinds[place] = kind = str(fates_of(tokens[place], target, tokenizer.mask))
        what = {'masked': '', 'random': '≠', 'kept': '='}[kind] + spell(tokenizer, target)
      below[place].append(_weighed(weights[slot], what))
  notes += [f'{key}: {own[key].tolist()}' for key in own if key not in known]
  texts = [spell(tokenizer, i) for i in tokens.tolist()]
  cells = [
    Cell(text, ' '.join(under), str(kind), f'place {place}, id {tokens[place]}')
    for place, (text, under, kind) in enumerate(zip(texts, below, kinds, strict=True))
  ]
  blocks = [_block(own, cells, *bounds) for bounds in itertools.pairwise(_cuts(own))]
  return Row(blocks, notes, frozenset(_signs(own, cells)))


def _signs(own: Mapping[str, np.ndarray], cells: list[Cell]) -> Iterator[str]:
  said = ' '.join(text for cell in cells for text in cell[:2])
  yield from (cell.kind for cell in cells)
  yield from (sign for sign in _SPELT.values() if sign in said)
  if re.search(r'<\d+>', said):
    yield '<>'
  for name in ('', *(key.removesuffix('places') for key in own if key.endswith('_places'))):
    weights = own[f'{name}weights']
    if f'{name}places' in own:
      weights = weights[weights != 0]
    if (weights != 1).any():
      yield '×'
    if name and len(weights):
      yield name


def legend(rows: Iterable[Row]) -> str:
  """What the signs in these rows mean, and no others."""
  signs = frozenset().union(*(shown.signs for shown in rows))
  said = [meaning for sign, meaning in MEANINGS.items() if sign in signs]
  said += [f'{name}1 is class 1' for name in sorted(signs) if name.endswith('_')]
  return '; '.join(['A token stands over its target', *said]) + '.'


def _weighed(weight: float, text: str) -> str:
  return text if weight == 1 else f'{weight:g}×{text}'


def _cuts(own: Mapping[str, np.ndarray]) -> list[int]:
  """Where blocks begin, and the end."""
  length = len(own['tokens'])
  cut = np.zeros(length - 1, bool)
  for key in ('segments', 'types'):
    if key in own:
      cut |= np.diff(own[key]) != 0
  if 'places' not in own:
    cut |= np.diff(own['weights'] > 0)
  if 'positions' in own:
    cut |= (np.diff(own['positions']) != 1) & (own.get('segments', own['tokens'] * 0 + 1)[1:] > 0)
  return [0, *(np.flatnonzero(cut) + 1).tolist(), length]


def _block(own: Mapping[str, np.ndarray], cells: list[Cell], start: int, stop: int) -> Block:
  about = [f'places {start}–{stop - 1}']
  if 'segments' in own:
    about.append(f'segment {own["segments"][start]}' if own['segments'][start] else 'padding')
  if 'types' in own:
    about.append(f'type {own["types"][start]}')
  if 'positions' in own and 'padding' not in about:
    about.append(f'positions {own["positions"][start]}–{own["positions"][stop - 1]}')
  if 'places' not in own and not own['weights'][start]:
    about.append('weight 0')
  if not {'padding', 'weight 0'} & set(about):
    return Block(', '.join(about), cells[start:stop])
  alike = [list(x) for _, x in itertools.groupby(cells[start:stop], lambda cell: cell[:2])]
  times = lambda text, n: f'{text} ({n} times)' if n > 1 else text
  faint = [Cell(times(x[0].text, len(x)), x[0].below, 'faint', x[0].where) for x in alike]
  return Block(', '.join(about), faint)


def on_terminal(shown: Row, width: int, colour: bool) -> Iterator[str]:
  """Lines: tokens above, targets below, in columns between bars."""
  paint = _painter(colour)
  bar = paint('|', 'faint')
  yield from shown.notes
  for block in shown.blocks:
    yield paint(block.about, 'head')
    for cells in _lines(block.cells, width):
      for field, kind_of in (('text', lambda cell: cell.kind), ('below', _kind_below)):
        if any(getattr(cell, field) for cell in cells):
          texts = [(_padded(getattr(x, field), _columns(x)), kind_of(x)) for x in cells]
          yield bar + ''.join(paint(*text) + bar for text in texts)


def table_on_terminal(table: Table, width: int, colour: bool) -> Iterator[str]:
  yield _painter(colour)(table.title, 'head')
  lines = [table.head, *table.lines]
  columns = [max(map(len, column)) for column in zip(*lines, strict=True)]
  for first, *rest in lines:
    numbers = (x.rjust(n) for x, n in zip(rest, columns[1:], strict=True))
    yield '  '.join((first.ljust(columns[0]), *numbers)).rstrip()
  yield from textwrap.wrap(table.note, width)


def page(title: str, tables: Iterable[Table], rows: Sequence[tuple[str, Row]]) -> Iterator[str]:
  """A page that needs nothing else, in parts; `rows` have titles."""
  e = html.escape
  styles = '\n'.join(f'.{kind} {{{css}}}' for kind, (_, css) in STYLES.items())
  yield _PAGE.format(title=e(title), styles=styles)
  for table in tables:
    yield f'<h2>{e(table.title)}</h2>\n<div class="wide"><table>\n'
    for tag, line in zip(
      ['th', *['td'] * len(table.lines)], [table.head, *table.lines], strict=True
    ):
      yield '<tr>' + ''.join(f'<{tag}>{e(x)}</{tag}>' for x in line) + '</tr>\n'
    yield '</table></div>\n' + (f'<p>{e(table.note)}</p>\n' if table.note else '')
  yield f'<p>{e(legend(shown for _, shown in rows))}</p>\n'
  for name, shown in rows:
    yield f'<h2>{e(name)}</h2>\n' + ''.join(f'<p>{e(note)}</p>\n' for note in shown.notes)
    for block in shown.blocks:
      cells = ''.join(
        f'<span title="{e(x.where)}"><b class="{x.kind}">{e(x.text)}</b>'
        f'<i class="{_kind_below(x)}">{e(x.below)}</i></span>'
        for x in block.cells
      )
      yield f'<p>{e(block.about)}</p>\n<div class="cells">{cells}</div>\n'


def _painter(colour: bool) -> Callable[[str, str], str]:
  return lambda text, kind: f'\x1b[{STYLES[kind][0]}m{text}\x1b[0m' if colour and kind else text


def _kind_below(cell: Cell) -> str:
  return cell.kind if cell.kind == 'faint' else ''


def _lines(cells: list[Cell], width: int) -> Iterator[list[Cell]]:
  line, used = [], 1
  for cell in cells:
    if line and used + _columns(cell) + 1 > width:
      yield line
      line, used = [], 1
    line.append(cell)
    used += _columns(cell) + 1
  yield line


def _columns(cell: Cell) -> int:
  return max(_width(cell.text), _width(cell.below))


def _padded(text: str, width: int) -> str:
  return text + ' ' * (width - _width(text))


def _width(text: str) -> int:
  """On a terminal, where Chinese is wide and an accent that combines has no width."""
  wide = sum(unicodedata.east_asian_width(c) in 'WF' for c in text)
  return len(text) + wide - sum(unicodedata.category(c) in ('Mn', 'Me') for c in text)
