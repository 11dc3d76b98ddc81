"""A study as a web page: one file that needs nothing else, for telephones and for large screens."""

import re
from html import escape

from lmjax.ablate import content, numbers, plots
from lmjax.ablate.content import Block, Bullets, Commands, Study, Table, Text, Verdict

MARKS = dict(zip(content.WORDS, '✓✕≈=?–✕', strict=True))
CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --quiet: #57606a;
  --card: #f6f8fa; --line: #d0d7de; --better: #00609a; --worse: #b04a00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181d; --ink: #e6e9ed; --quiet: #a0a9b4; --card: #1f242b; --line: #3a424d;
    --better: #6fb8ea; --worse: #f39a54; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
  -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; line-height: 1.4; margin: 1.25rem 0 .5rem; }
p, ul { margin: .5rem 0; max-width: 46rem; text-wrap: pretty; }
ul { padding-left: 1.25rem; }
a { color: var(--better); }
.quiet, figcaption, caption, dt { color: var(--quiet); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%),
  1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-left: .4rem solid
  var(--quiet); border-radius: .4rem; padding: .75rem 1rem; }
.card h3 { margin: 0; font-family: ui-monospace, monospace; font-size: .95rem; }
.card p { margin: .25rem 0; }
.outcome { font-weight: 700; color: var(--quiet); }
.sentence { font-size: 1.1rem; text-wrap: balance; }
.better { border-left-color: var(--better); }
.better .outcome { color: var(--better); }
.worse { border-left-color: var(--worse); }
.worse .outcome { color: var(--worse); }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .75rem; margin: .5rem 0 0; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .25rem; max-width: 46rem; }
.forest { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .5rem 2rem; }
.forest svg { flex: 0 1 32rem; }
.forest figcaption { flex: 1 1 16rem; }
.curves { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem,
  100%), 1fr)); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0;
  max-width: none; }
.legend li { display: flex; gap: .5rem; align-items: baseline; }
.legend svg { flex: none; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { padding: .3rem .75rem; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child { padding-left: 0; }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 600; }
tbody th span { display: block; width: max-content; max-width: min(22rem, 36vw);
  white-space: normal; overflow-wrap: anywhere; }
.numeric td, .numeric th:not(:first-child) { text-align: right; }
.long { white-space: normal; overflow-wrap: anywhere; min-width: min(18rem, 50vw);
  max-width: 40rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0;
  padding: .6rem .75rem; font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap;
  user-select: all; }
summary { cursor: pointer; padding: .35rem 0; font-weight: 600; }
"""


def render(study: Study) -> str:
  title = escape(study['title'])
  parts = [
    f'<header><h1>{_name(study["title"])}</h1>',
    f'<p>{escape(content.headline(study))}</p></header>',
    '<main>',
    _section('Verdicts', _verdicts(study)),
    _section('Differences', _forest(study)),
    _section('Curves', _curves(study)),
    *(_section(s.title, ''.join(map(_block, s.blocks))) for s in content.sections(study)),
    '</main>',
  ]
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n'
    + '\n'.join(filter(None, parts))
    + '\n</body>\n</html>\n'
  )


def _section(title: str, body: str) -> str:
  return f'<section>\n<h2>{title}</h2>\n{body}\n</section>' if body else ''


def _verdicts(study: Study) -> str:
  cards = ''.join(map(_card, content.verdicts(study)))
  return f'<p>{escape(content.summary(study))}</p>\n<div class="cards">\n{cards}</div>'


def _card(verdict: Verdict) -> str:
  words = f'{MARKS[verdict.outcome]} {content.WORDS[verdict.outcome]}'
  facts = ''.join(f'<dt>{escape(a)}</dt><dd>{escape(b)}</dd>' for a, b in verdict.facts)
  return (
    f'<article class="card {verdict.outcome}">\n<h3>{_name(verdict.arm)}</h3>\n'
    f'<p class="quiet">against {_name(verdict.reference)}</p>\n'
    f'<p class="outcome">{words}</p>\n'
    f'<p class="sentence">{escape(verdict.sentence)}</p>\n<dl>{facts}</dl>\n</article>\n'
  )


def _forest(study: Study) -> str:
  plot = plots.forest(study)
  margin = f' Shaded: less than the margin of {study["margin"]:g}{numbers.unit(study)}.'
  caption = _name(
    f'Differences in {study["metric"]} from {study["arms"][0]["name"]}, with intervals of '
    f'{100 * (1 - study["alpha"]):g} % or more, as Holm corrects them.'
    f'{margin if study["margin"] else ""} Hollow points are not decided.'
  )
  figure = f'<figure class="forest">\n{plot}\n<figcaption>{caption}</figcaption>\n</figure>'
  return figure if plot else ''


def _curves(study: Study) -> str:
  drawn = [plots.curves(study, axis) for axis in plots.AXES]
  if not any(drawn):
    return ''
  arms = (f'<li>{plots.swatch(n)}{_name(arm["name"])}</li>' for n, arm in enumerate(study['arms']))
  about = (
    'Strong lines are means over seeds, with a band from the lowest to the highest seed, as far as '
    'all of them go; thin lines are single seeds beyond that. The first fall is cut off.'
  )
  if why := study['comparable'].get('train/loss'):
    about += f' The loss of training does not compare: {why}.'
  figures = ''.join(f'<figure>{plot}</figure>\n' for plot in drawn if plot)
  return (
    f'<ul class="legend">{"".join(arms)}</ul>\n<div class="curves">\n{figures}</div>\n'
    f'<p class="quiet">{escape(about)}</p>'
  )


def _block(block: Block) -> str:
  match block:
    case Text(words):
      return f'<p>{escape(words)}</p>\n'
    case Bullets(items):
      return f'<ul>{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>\n'
    case Commands(title, lines):
      commands = '\n'.join(f'<pre>{escape(line)}</pre>' for line in lines)
      if len(lines) == 1:
        return f'<h3>{_name(title)}</h3>\n{commands}\n'
      return f'<details><summary>{_name(title)}</summary>\n{commands}\n</details>\n'
    case Table():
      return _table(block)


def _table(table: Table) -> str:
  head = ''.join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
  rows = ''.join(f'<tr>{_cells(row)}</tr>\n' for row in table.rows)
  title, kind = escape(table.title), ' class="numeric"' if table.numeric else ''
  return (
    f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">\n<table{kind}>\n'
    f'<caption>{title}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n'
    '</table>\n</div>\n'
  )


def _cells(row: list[str]) -> str:
  name, *values = row
  long = lambda value: ' class="long"' if len(value) > 40 else ''
  cells = ''.join(
    f'<td{long(value)}>{_name(value) if long(value) else escape(value)}</td>' for value in values
  )
  return f'<th scope="row"><span>{_name(name)}</span></th>{cells}'


def _name(text: str) -> str:
  """It may be broken where its parts end."""
  return re.sub(r'([/=,_]|[.](?!\d))', r'\1<wbr>', escape(text))
