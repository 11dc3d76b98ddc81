"""A study as Markdown, as GitHub reads it: what the page says, without its plots."""

import re

from lmjax.ablate import content
from lmjax.ablate.content import Block, Bullets, Commands, Study, Table, Text, Verdict
from lmjax.ablate.numbers import NOTHING


def render(study: Study) -> str:
  parts = [
    f'# {_escape(study["title"])}',
    _line(content.headline(study)),
    '## Verdicts',
    _line(content.summary(study)),
    *_verdicts(content.verdicts(study)),
  ]
  for section in content.sections(study):
    parts += [f'## {section.title}', *map(_block, section.blocks)]
  return '\n\n'.join(parts) + '\n'


def _verdicts(verdicts: list[Verdict]) -> list[str]:
  """A table, with a column for each fact that any of them has."""
  facts = dict.fromkeys(name for verdict in verdicts for name, _ in verdict.facts)
  head = ['arm', 'against', 'outcome', 'verdict', *facts]
  rows = [
    [v.arm, v.reference, content.WORDS[v.outcome], v.sentence]
    + [dict(v.facts).get(name, NOTHING) for name in facts]
    for v in verdicts
  ]
  return [_table(head, rows)] if rows else []


def _block(block: Block) -> str:
  match block:
    case Text(words):
      return _line(words)
    case Bullets(items):
      return '\n'.join(f'- {_line(item)}' for item in items)
    case Commands(title, lines):
      return '\n\n'.join([f'**{_escape(title)}**', *map(_code, lines)])
    case Table():
      return f'**{_escape(block.title)}**\n\n{_table(block.head, block.rows)}'


def _table(head: list[str], rows: list[list[str]]) -> str:
  cells = [[*map(_escape, head)], ['---'] * len(head), *([*map(_escape, row)] for row in rows)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in cells)


def _code(text: str) -> str:
  """Between more backticks than it has in a row."""
  fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
  return f'{fence}sh\n{text}\n{fence}'


def _escape(text: str) -> str:
  """As it is, on one line, whatever of it would be a sign of Markdown or HTML."""
  text = ' '.join(text.split()).replace('&', '&amp;').replace('<', '&lt;')
  text = re.sub(r'([\\`*|~$])', r'\\\1', text).replace('](', ']\\(')
  return re.sub(r'(?<!\w)_|_(?!\w)', r'\\_', text)


def _line(text: str) -> str:
  """The same at the beginning of a line, where there are more such signs."""
  return re.sub(r'^(\d*)([-#+>.)=])', r'\1\\\2', _escape(text))
