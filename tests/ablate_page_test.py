"""The report of an ablation, as a page and as Markdown: whole, safe, and the same every time."""

import copy
import functools
import hashlib
import html
import html.parser
import itertools
import json
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import matplotlib.figure
import numpy as np
import pytest

from lmjax.ablate import content, markdown, numbers, page, plots

NASTY = [
  '<script>alert("1")</script>&amp;',
  'a|b&"c"\'d\' $x$ `e` 中 -- __x__',
  '_f_ *g* [h](i) ]]> ```',
]
LOSS = 'eval/validation/loss'
SETTINGS = dict(matplotlib.rcParams)
VOID = ('meta', 'wbr')


def study_of(names, seeds=3, status=None, curves=True, outcomes=('better', 'inconclusive')):
  """Of numbers that are all different; `status` of (arm, seed) where it is not 'finished'."""
  rng, status = np.random.default_rng(len(names) + seeds), status or {}
  study = {
    'title': 'experiments/x.py & more',
    'command': f'python -m lmjax.ablate --vary "a={",".join(names)}"',
    **{'metric': LOSS, 'lower_is_better': True, 'unit': 'nats', 'match': 'flops'},
    **{'alpha': 0.05, 'power': 0.8, 'margin': 0.01, 'comparisons': [], 'curves': {}},
    'fixed': {'named': ['a'], 'moved': {'a': names, 'b.c': [1, 2]}, 'lines': ['data: the same']},
    'comparable': {LOSS: '', 'train/loss': f'only {names[0]} has it', 'eval/x_y': ''},
    'noise': dict(
      zip(('deviation', 'detectable', 'pairing_gain'), (0.011, 0.02, 5.2), strict=True)
    ),
    'caveats': [f'of {names[-1]} there is little'],
    'arms': [],
  }
  if seeds < 2:
    study['noise'] = dict.fromkeys(study['noise'])
  for n, name in enumerate(names):
    runs = [_run(name, seed, status.get((n, seed), 'finished'), rng) for seed in range(seeds)]
    values = [run['value'] for run in runs if run['value'] is not None]
    sizes = {'parameters': 1234567 + n, 'flops_per_token': 1.2e7, 'steps': 2000, 'tokens': 4096000}
    rest = {'flops': 1e12, 'remainder': '0.3 % more' * (n > 0), 'price': None, 'overrides': {}}
    speed = {'tokens_per_second': 12000.0, 'seconds': 340.0} if values else {}
    study['arms'].append(
      {'name': name, 'command': f'python -m lmjax.main --config.a={name}', 'runs': runs}
      | {'mean': float(np.mean(values)) if values else None}
      | {'deviation': float(np.std(values, ddof=1)) if len(values) > 1 else None}
      | {**dict.fromkeys(('tokens_per_second', 'seconds')), **speed, **sizes, **rest}
    )
    if curves:
      lengths = {str(run['seed']): 100 if run['status'] == 'finished' else 40 for run in runs}
      study['curves'][name] = {seed: _curve(length, rng) for seed, length in lengths.items()}
    if n:
      outcome = outcomes[n % len(outcomes)]
      study['comparisons'].append(_comparison(study, n, outcome, rng))
  return study


def _run(name, seed, status, rng):
  value = float(rng.normal(4.3, 0.1)) if status == 'finished' else None
  return {
    **{'seed': seed, 'status': status, 'why': f'it {status} & ended' * (value is None)},
    **{'workdir': f'runs/{name}/{seed}', 'command': f'main --config.a={name} --seed={seed}'},
    'metrics': {LOSS: value, 'eval/x_y': 0.5} if value else {},
    **{'value': value, 'seconds': 338.0, 'tokens_per_second': 12100.0},
    'record': {'code': f'c0ffee{seed % 2}', 'versions': {'jax': '0.10.2'}} if value else {},
  }


def _curve(length, rng):
  x = np.arange(1, length + 1) * 20.0
  loss = [*(4 + 6 * np.exp(-x / 300) + rng.normal(0, 0.01, length))]
  loss[-1] = loss[-1] if length == 100 else None
  time = {'seconds': [*(x * float(rng.uniform(1, 1.1)))]}
  return {'steps': [*x], 'tokens': [*(x * 512)], 'flops': [*(x * 1e9)], 'loss': loss} | time


def _comparison(study, n, outcome, rng):
  arms = study['arms'][0], study['arms'][n]
  done = [{r['seed'] for r in arm['runs'] if r['status'] == 'finished'} for arm in arms]
  seeds, known = sorted(done[0] & done[1]), len(done[0] & done[1]) > 1
  difference, half, p = float(rng.normal(0, 0.1)), float(rng.uniform(0.01, 0.09)), rng.uniform()
  return {
    **{'arms': [arm['name'] for arm in arms], 'metric': LOSS, 'seeds': seeds},
    'difference': difference if seeds else None,
    'interval': [difference - half, difference + half] if known else None,
    'p_value': p / 10 if known else None,
    'p_holm': p if known else None,
    'outcome': outcome if known else 'unknown',
    **{'verdict': f'said of {arms[1]["name"]}', 'seeds_needed': 0 if known else 2 - len(seeds)},
    'pairing_gain': float(rng.uniform(1, 9)) if known else None,
  }


STUDIES = {
  'typical': study_of(['a=1', 'a=2', 'a=3']),
  'one seed': study_of(['a=1', 'a=2'], seeds=1),
  'diverged': study_of(['a=1', 'a=2'], status={(1, seed): 'diverged' for seed in range(3)}),
  'unfinished': study_of(
    ['a=1', 'a=2', 'a=3'], status={(0, 0): 'unfinished', (2, 2): 'unfinished'}
  ),
  'names': study_of(NASTY),
  'twelve arms': study_of(
    [f'a={n},b.c_d={n * n}' for n in range(12)], outcomes=[*content.WORDS][:-1]
  ),
  'no curves': study_of(['a=1', 'a=2', 'a=3'], curves=False),
  'one arm': study_of(['a=1']),
}
every_study = pytest.mark.parametrize('name', STUDIES)


@functools.cache
def page_of(name):
  return page.render(STUDIES[name])


class Reader(html.parser.HTMLParser):
  """Fails where tags do not balance; keeps tags and the text of each article and of all."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.text, self.articles = [], [], '', []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.handle_startendtag(tag, attributes)
    self.open += [] if tag in VOID else [tag]
    self.articles += [''] if tag == 'article' else []

  def handle_startendtag(self, tag, attributes):
    keys = [key for key, _ in attributes]
    assert len(keys) == len(set(keys))
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if 'style' not in self.open:
      self.text += data
    if 'article' in self.open:
      self.articles[-1] += data


@every_study
def test_page_is_well_formed_and_alone(name):
  read = Reader(page_of(name))
  kinds = [tag for tag, _ in read.tags]
  assert not {'script', 'link', 'img', 'iframe', 'object', 'f', 'metadata'} & set(kinds)
  assert kinds.count('style') == kinds.count('h1') == kinds.count('main') == 1
  levels = [int(kind[1]) for kind in kinds if re.fullmatch('h[1-6]', kind)]
  assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
  ids = [a['id'] for _, a in read.tags if 'id' in a]
  assert len(ids) == len(set(ids))
  for tag, attributes in read.tags:
    assert 'src' not in attributes
    assert not any(key.startswith('on') for key in attributes)
    if 'href' in attributes:
      assert attributes['href'].removeprefix('#') in ids
    for value in attributes.values():
      assert set(re.findall(r'url\(#(.*?)\)', value)) <= set(ids)
    if tag == 'th':
      assert attributes['scope'] in ('row', 'col')
    if tag == 'svg':
      assert attributes.get('aria-hidden') or (attributes['role'], bool(attributes['aria-label']))
  outside = page_of(name).replace('xmlns="http://www.w3.org/2000/svg"', '')
  assert not re.search(r'https?:|//www|@import|url\((?!#)', outside)


@every_study
def test_page_says_everything(name):
  study, read = STUDIES[name], Reader(page_of(name))
  said = [study['title'], study['command'], *study['caveats'], *study['fixed']['lines']]
  said += [why for why in study['comparable'].values() if why]
  for arm in study['arms']:
    said += [arm['name'], arm['command'], f'{arm["parameters"]:,}']
    for run in arm['runs']:
      said += [run['command'], run['why']]
      said += [run['status']] if run['value'] is None else [f'{run["value"]:.3f}']
  for text in said:
    assert text in read.text
  assert len(read.articles) == len(study['comparisons'])
  for comparison, card in zip(study['comparisons'], read.articles, strict=True):
    for text in (*comparison['arms'], comparison['verdict'], content.WORDS[comparison['outcome']]):
      assert text in card
    _check_numbers(comparison, card)


def _check_numbers(comparison, card):
  found = [float(x) for x in re.findall(r'-?\d+\.?\d*(?:e-?\d+)?', card.replace('−', '-'))]
  said = [comparison['difference'], *(comparison['interval'] or []), comparison['pairing_gain']]
  said += [comparison['p_value'], comparison['p_holm'], *comparison['seeds']]
  for number in said:
    near = lambda x, y=number: abs(x - y) <= max(6e-4, 0.05 * abs(y))
    assert number is None or any(map(near, found)), (number, found)


@every_study
def test_plots_are_xml(name):
  drawn = re.findall(r'<svg.*?</svg>', page_of(name), re.DOTALL)
  labelled = [ElementTree.fromstring(svg) for svg in drawn if 'role="img"' in svg]
  has_curves = bool(STUDIES[name]['curves'])
  differences = [c['difference'] for c in STUDIES[name]['comparisons']]
  assert len(labelled) == 3 * has_curves + any(x is not None for x in differences)
  assert len(drawn) - len(labelled) == has_curves * len(STUDIES[name]['arms'])
  assert not any(plots.INK in svg or '@' in svg or 'DejaVu' in svg for svg in drawn)
  assert sum(map(len, drawn)) < 30_000 * (1 + len(STUDIES[name]['arms']))


@every_study
def test_markdown_tables_are_straight(name):
  study, text = STUDIES[name], markdown.render(STUDIES[name])
  widths, fence = [], ''
  for line in text.splitlines():
    if line.startswith('```'):
      fence = '' if fence else line.removesuffix('sh')
      assert set(fence) <= {'`'}
    elif fence:
      assert fence not in line
    else:
      assert not re.search(r'<|(?<!\\)`|\]\(', line)
      cells = len(re.findall(r'(?<!\\)\|', line))
      assert not cells or line.startswith('| ')
      widths, before = [*widths, cells], widths[-1:]
      assert not cells or before in ([0], [cells])
  assert not fence
  assert max(widths) > 5
  plain = html.unescape(re.sub(r'\\(.)', r'\1', text))
  for arm in study['arms']:
    assert plain.count(arm['name']) >= 2 + len(arm['runs'])
    assert f'\n{arm["command"]}\n' in text


def test_same_bytes_in_another_process():
  """And neither pyplot nor JAX is needed, and what matplotlib is set to stays as it was."""
  study = copy.deepcopy(STUDIES['names'])
  digest = hashlib.sha256(page.render(study).encode()).hexdigest()
  assert study == STUDIES['names']
  assert dict(matplotlib.rcParams) == SETTINGS
  code = (
    'import hashlib, json, sys\nfrom lmjax.ablate import page\n'
    'print(hashlib.sha256(page.render(json.load(sys.stdin)).encode()).hexdigest())\n'
    "assert 'matplotlib.pyplot' not in sys.modules\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {'PYTHONHASHSEED': '7'},
    **{'input': json.dumps(study), 'capture_output': True, 'text': True, 'check': True},
  )
  assert done.stdout.strip() == digest


def test_means_are_where_all_seeds_have_data():
  seeds = [{'x': [0, 1, 2, 3], 'loss': [4.0, 3, 2, 1]}, {'x': [1, 2, 4], 'loss': [5.0, 4, None]}]
  lines = plots._lines([*seeds, {'x': [1, 2], 'loss': [float('nan'), 1.0]}], 'x')
  assert [list(x) for x, _ in lines] == [[0, 1, 2, 3], [1, 2]]
  axes = matplotlib.figure.Figure().add_subplot()
  ((grid, mean),) = plots._draw(axes, lines, 'red', '')
  assert (grid[0], grid[-1], mean[0], mean[-1]) == (1, 2, 4, 3)
  (band,) = axes.collections
  assert band.get_datalim(axes.transData).intervaly.tolist() == [2, 5]
  thin, strong = axes.lines
  assert (thin.get_xdata()[0], thin.get_xdata()[-1]) == (2, 3)
  assert thin.get_linewidth() < strong.get_linewidth()
  assert (
    plots._draw(axes, [(np.arange(2), np.ones(2)), (np.arange(3, 5), np.ones(2))], 'red', '') == []
  )


def test_arms_look_different():
  looks = [plots._look(n) for n in range(len(plots.COLOURS) * len(plots.DASHES))]
  assert len(set(looks)) == len(looks)


def _contrast(a, b):
  levels = np.array([[int(x[i : i + 2], 16) / 255 for i in (1, 3, 5)] for x in (a, b)])
  linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
  low, high = sorted(linear @ [0.2126, 0.7152, 0.0722])
  return (high + 0.05) / (low + 0.05)


def test_colours_can_be_seen_on_both_papers():
  light, dark = page.CSS.split('@media (prefers-color-scheme: dark)')
  for sheet in (light, dark):
    colour = {name: (x * 2)[:7] for name, x in re.findall(r'--(\w+): (#\w+);', sheet)}
    colour['paper'] = '#ffffff' if colour['paper'].startswith('#fff') else colour['paper']
    for text in ('ink', 'quiet', 'better', 'worse'):
      assert min(_contrast(colour[text], colour[on]) for on in ('paper', 'card')) >= 4.5
    for line in {*plots.COLOURS, *plots.OUTCOMES.values()} - {plots.INK}:
      assert _contrast(line, colour['paper']) >= 3


def test_without_margin_and_unit_nothing_is_said_of_them():
  study = {**STUDIES['typical'], 'margin': 0.0, 'unit': '', 'lower_is_better': False}
  for text in (Reader(page.render(study)).text, markdown.render(study)):
    assert 'FLOPs, by eval/validation/loss: higher is better.' in text
    assert not re.search('nats|margin|of no interest', text)


@pytest.mark.parametrize(
  ('half', 'deviation', 'margin', 'said'),
  [
    (0.0042, 0.5, 0.1, '−1.2346'),
    (0.42, 0.5, 0.1, '−1.23'),
    (42.0, None, 0.1, '−1'),
    (None, 0.011, 0.5, '−1.235'),
    (None, None, 0.5, '−1.23'),
    (0.0, 0.0, 0.0, '−1.2346'),
  ],
)
def test_numbers_have_the_digits_that_matter(half, deviation, margin, said):
  comparisons = [{'interval': None if half is None else [-half, half]}]
  study = {'comparisons': comparisons, 'noise': {'deviation': deviation}, 'margin': margin}
  assert numbers.metric(study)(-1.234567) == said
  assert numbers.metric(study)(None) == numbers.NOTHING


@pytest.mark.parametrize(
  ('seconds', 'said'),
  [(None, '–'), (3.21, '3.21 s'), (340, '5.7 min'), (7000, '116.7 min'), (90000, '25.0 h')],
)
def test_durations(seconds, said):
  assert numbers.duration(seconds) == said
