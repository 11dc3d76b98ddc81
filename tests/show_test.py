"""Rows shown token by token: all of a batch is there, and nothing of a text gets loose."""

import html.parser
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from lmjax import terminal
from lmjax.data import __main__ as command
from lmjax.data import loader, show, tokenizer
from lmjax.data.show import Block, Cell, Row
from lmjax.data.statistics import Table
from tests.contract_test import OBJECTIVES, make
from tests.train_test import as_file

every_objective = pytest.mark.parametrize('name', OBJECTIVES)
HOSTILE = (
  'a \x1b[31mred\x1b]0;title\x07 \x9b2J \x01\x08\r\x7f <script>alert("1")</script> &amp; \'x\' '
  '\u202egnp.exe\u2066 \u200d\ufeff\u2028 \ue000 \ud800 [MASK] 語 e\u0301 |\n\t' * 9
)


@pytest.fixture(scope='session')
def hostile(parts, tmp_path_factory):
  """hostile(tokenizer, objective) -> an experiment on a text with all that is harmful."""
  file = tmp_path_factory.mktemp('hostile') / 'hostile.txt'
  file.write_bytes(HOSTILE.encode(errors='replace'))
  data = {'data.train': str(file), 'data.document': 'line', 'data.eval.valid': str(file)}

  def build(kind: str, objective: str):
    return parts(objective, **data, **{'tokenizer': {'name': kind}, 'length': 96})

  return build


def expanded(row: Row) -> list[Cell]:
  """A cell for each place."""
  cells = []
  for block in row.blocks:
    first, last = map(int, re.match(r'places (\d+)–(\d+)', block.about).groups())
    assert first == len(cells)
    for cell in block.cells:
      many = re.fullmatch(r'(.*) \((\d+) times\)', cell.text)
      cells += [cell._replace(text=many[1])] * int(many[2]) if many else [cell]
    assert last == len(cells) - 1
  return cells


@every_objective
def test_all_of_a_row_is_shown(parts, name):
  made = make(parts, name)
  t, examples = made.tokenizer, made.examples('train')
  indices = np.array([0, 1, 2, len(examples) - 1])
  batch = examples(indices, np.zeros_like(indices))
  for r in range(len(indices)):
    row = show.row(batch, r, t)
    expected = [[] for _ in batch['tokens'][r]]
    kinds = ['special' if t.special[i] else '' for i in batch['tokens'][r]]
    if 'places' not in batch:
      for at, target, weight in zip(
        expected, batch['targets'][r], batch['weights'][r], strict=True
      ):
        at.append(show.spell(t, target) if weight else f'0×{show.spell(t, target)}')
    for prefix in ('pair_', '') if 'places' in batch else ():
      if f'{prefix}places' not in batch:
        continue
      keys = (f'{prefix}{x}' for x in ('places', 'targets', 'weights'))
      for place, target, weight in zip(*(batch[key][r].tolist() for key in keys), strict=True):
        token = batch['tokens'][r, place]
        mark = '' if token == t.mask else '=' if token == target else '≠'
        if weight and not prefix:
          kinds[place] = {'': 'masked', '=': 'kept', '≠': 'random'}[mark]
        if weight:
          expected[place].append(f'pair_{target}' if prefix else mark + show.spell(t, target))
      used = int(batch[f'{prefix}weights'][r].sum())
      of = batch[f'{prefix}weights'].shape[1]
      assert f'{prefix}places: {used} of {of} are used, the others weigh 0' in row.notes
    cells = expanded(row)
    assert [x.text for x in cells] == [show.spell(t, i) for i in batch['tokens'][r]]
    assert [x.below for x in cells] == [' '.join(x) for x in expected]
    real = [x.kind != 'faint' for x in cells]
    assert [x.kind for x in cells if x.kind != 'faint'] == list(itertools.compress(kinds, real))
    assert real == (batch.get('segments', batch['weights'])[r] > 0).tolist()


@every_objective
def test_blocks_are_segments(parts, name):
  batch = loader.Loader(make(parts, name).examples('train'), 8, 0).batch(0)
  for r in range(8):
    blocks = show.row(batch, r, tokenizer.get('bytes', ())).blocks
    assert sum('padding' in block.about for block in blocks) <= 1
    for block in blocks:
      at = slice(*(int(x) + i for i, x in enumerate(re.findall(r'\d+', block.about)[:2])))
      own = {key: batch[key][r, at] for key in ('segments', 'types', 'positions') if key in batch}
      assert all(len(set(own[key])) == 1 for key in ('segments', 'types') if key in own)
      segment = own.get('segments', [1])[0]
      expected = [f'places {at.start}–{at.stop - 1}']
      expected += [f'segment {segment}' if segment else 'padding'] if 'segments' in own else []
      expected += [f'type {own["types"][0]}'] if 'types' in own else []
      if 'positions' in own and segment:
        assert (np.diff(own['positions']) == 1).all()
        expected += [f'positions {own["positions"][0]}–{own["positions"][-1]}']
      assert block.about == ', '.join(expected) or block.about.endswith('weight 0')


@every_objective
def test_the_legend_has_what_occurs_and_nothing_else(parts, name):
  made = make(parts, name)
  batch = loader.Loader(made.examples('train'), 8, 0).batch(0)
  legend = show.legend(show.row(batch, r, made.tokenizer) for r in range(8))
  assert legend.startswith('A token stands over its target; ')
  for text in ('[MASK] over', '≠', '= and itself'):
    assert (text in legend) == ('places' in batch)
  assert ('pair_1 is class 1' in legend) == ('pair_places' in batch)
  assert '␣ is a space' in legend
  assert '⇥' not in legend
  assert '×' not in legend


def test_a_lower_line_is_faint_where_the_weight_is_0():
  t = tokenizer.get('characters', ['0×a'])
  zero, times, a = t.encode('0×a')
  batch = {'tokens': [zero, times, a], 'targets': [times, a, zero], 'weights': [10, 1, 0]}
  row = show.row({key: np.array([x]) for key, x in batch.items()}, 0, t)
  text = ''.join(show.page('x', [], [('a row', row)]))
  assert re.findall('<i class="(.*?)">(.*?)</i>', text) == [
    ('', '10××'),
    ('', 'a'),
    ('faint', '0×0'),
  ]
  *_, lower = show.on_terminal(row, 60, colour=True)
  assert lower.endswith('\x1b[2m0×0\x1b[0m\x1b[2m|\x1b[0m')
  assert '× is the weight of a target' in show.legend([row])


def test_a_table_without_a_note_has_no_paragraph_for_it():
  table = Table('A title', ('', 'n'), [('one', '1')])
  assert '<p></p>' not in ''.join(show.page('x', [table], []))


def test_weights_that_are_no_0_or_1_and_keys_of_an_objectives_own():
  t = tokenizer.get('bytes', ())
  a, b, c = t.encode('abc')
  batch = {'tokens': [a, b, c, a], 'targets': [b, c, a, b], 'weights': [1, 0.5, 1, 0]}
  batch |= {'positions': [0, 1, 0, 1], 'scores': [7, 8]}
  row = show.row({key: np.array([x]) for key, x in batch.items()}, 0, t)
  assert row.notes == ['scores: [7, 8]']
  assert [x.below for block in row.blocks for x in block.cells] == ['b', '0.5×c', 'a', '0×b']
  assert [block.about for block in row.blocks] == [
    'places 0–1, positions 0–1',
    'places 2–2, positions 0–0',
    'places 3–3, positions 1–1, weight 0',
  ]


@pytest.mark.parametrize(
  ('text', 'shown'),
  [
    ('the Größe', 'the␣Größe'),
    ('\n\t', '↵⇥'),
    ('\x1b[31m\x07\x00', '␛[31m␇␀'),
    ('\x7f\x9b\x85', '␡<U+009B><U+0085>'),
    ('\u202e\u200d\ufeff\u2028\xa0', '<U+202E><U+200D><U+FEFF><U+2028><U+00A0>'),
    ('\ue000\ud800\U000e0041', '<U+E000><U+D800><U+E0041>'),
    ('語e\u0301😀', '語e\u0301😀'),
  ],
)
def test_visible(text, shown):
  assert show.visible(text) == shown


def test_tokens_that_are_no_text_are_told_apart():
  t = tokenizer.get('bytes', ())
  assert [show.spell(t, i) for i in t.encode('é')] == ['<200>', '<174>']
  assert show.spell(t, t.mask) == '[MASK]'


CASES = [('bytes', 'clm'), ('bytes', 'mlm'), ('characters', 'clm'), ('characters', 'mlm')]


def all_rows(made) -> list[Row]:
  count = np.arange(len(made.examples('train')))
  batch = made.examples('train')(count, np.zeros_like(count))
  return [show.row(batch, r, made.tokenizer) for r in count]


@pytest.mark.parametrize(('kind', 'objective'), CASES)
def test_a_terminal_gets_letters_and_our_colours(hostile, kind, objective):
  for row in all_rows(hostile(kind, objective)):
    plain = list(show.on_terminal(row, 60, colour=False))
    colour = list(show.on_terminal(row, 60, colour=True))
    ours = '|'.join(
      re.escape(f'\x1b[{code}m') for code in ('0', *(x for x, _ in show.STYLES.values()))
    )
    assert [re.sub(ours, '', line) for line in colour] == plain
    assert plain != colour
    assert not re.search(
      r'[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]', ''.join(plain)
    )
    assert all(map(str.isprintable, plain))
    lines = [line for line in plain if line.startswith('|')]
    assert all(len(line) + line.count('語') - line.count('\u0301') <= 60 for line in lines)


class Reader(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.tags, self.text, self.attributes = set(), [], set()

  def handle_starttag(self, tag, attributes):
    self.tags.add(tag)
    self.attributes |= {name for name, _ in attributes}

  def handle_data(self, data):
    self.text.append(data)


OURS = set('html meta title style h1 h2 div table tr th td p span b i'.split())


@pytest.mark.parametrize(('kind', 'objective'), CASES)
def test_a_page_has_no_tags_but_ours(hostile, kind, objective):
  rows, reader = all_rows(hostile(kind, objective)), Reader()
  reader.feed(''.join(show.page('x', [], [('a row', row) for row in rows])))
  assert reader.tags <= OURS
  assert reader.attributes <= {'lang', 'charset', 'http-equiv', 'content', 'name', 'class', 'title'}
  cells = [x for row in rows for block in row.blocks for cell in block.cells for x in cell[:2] if x]
  text = ''.join(reader.text)
  at = 0
  for cell in cells:
    at = text.index(cell, at) + len(cell)


def test_everything_on_a_page_is_escaped():
  bad = '<script>"\'&amp;'
  cell = Cell(bad, bad, 'masked', bad)
  row = Row([Block(bad, [cell])], [bad])
  text = ''.join(show.page(bad, [Table(bad, (bad, bad), [(bad, bad)], bad)], [(bad, row)]))
  reader = Reader()
  reader.feed(text)
  assert reader.tags == OURS
  assert ''.join(reader.text).count(bad) == 13
  assert '<script' not in text


def test_columns_stand_under_each_other():
  cells = [Cell('語', 'a', '', ''), Cell('e\u0301', '≠xy', 'random', ''), Cell('wide', '', '', '')]
  lines = list(show.on_terminal(Row([Block('about', cells)], []), 12, colour=False))
  assert lines == ['about', '|語|e\u0301  |', '|a |≠xy|', '|wide|']


def test_tables_on_a_terminal():
  table = Table('A title', ('', 'n'), [('one', '1'), ('twelve', '12')], 'a note of words')
  assert list(show.table_on_terminal(table, 8, False)) == [
    *('A title', '         n', 'one      1', 'twelve  12'),
    *('a note', 'of words'),
  ]


def test_rows_are_those_that_training_sees(parts):
  made = parts('mlm', **{'batch': 4})
  batches = loader.Loader(made.examples('train'), 4, made.config['seed'])
  for number, (title, row) in enumerate(command.rows(made, 6)):
    assert title == f'Row {number % 4} of step {number // 4}'
    assert row == show.row(batches.batch(number // 4), number % 4, made.tokenizer)


@pytest.mark.parametrize(
  ('environment', 'tty', 'colours'),
  [
    ({}, True, True),
    ({}, False, False),
    ({'NO_COLOR': '1'}, True, False),
    ({'NO_COLOR': ''}, True, True),
    ({'TERM': 'dumb'}, True, False),
  ],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, environment, tty, colours):
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: tty, raising=False)
  for name in ('NO_COLOR', 'TERM'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert terminal.has_colours() == colours


def test_the_command(tiny, tmp_path):
  c = tiny('mlm', **OBJECTIVES['bert'][1], cache=str(tmp_path / 'cache'))
  shown = [sys.executable, '-m', 'lmjax.data', 'show', as_file(c, tmp_path), '--rows=2']
  environment = os.environ | {'PYTHONIOENCODING': 'ascii'}
  done = subprocess.run(shown, capture_output=True, timeout=120, env=environment)
  assert done.returncode == 0, done.stderr.decode()
  said = done.stdout.decode('ascii')
  assert said.count('\nRow ') == 2
  assert '\x1b' not in said
  assert 'What is there twice' in said
  assert 'tokenizing' not in said
  assert re.search('^tokenizing .*train.txt$', done.stderr.decode(), re.M)
  out = tmp_path / 'rows.html'
  done = subprocess.run([*shown, f'--html={out}'], capture_output=True, timeout=120)
  assert done.returncode == 0, done.stderr.decode()
  assert out.read_text(encoding='utf-8').count('<h2>Row ') == 2
