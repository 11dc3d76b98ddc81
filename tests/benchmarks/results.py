"""The table of results, made from the headers of the experiments.

python tests/benchmarks/results.py

It writes experiments/RESULTS.md.  In a header a line that begins with `python -m` or with `python
tests/` is a command, and begins a row.  What was measured with it follows up to the next command:
`Hardware: …  Time: …  Result: …`, and where there is any `Published: …`, with its source, and
`Curve: …`.  Each ends where the next begins, or at a blank line.
"""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
FILE = ROOT / 'experiments/RESULTS.md'
FIELDS = ('Result', 'Published', 'Curve', 'Hardware', 'Time')
NOT_RUN = 'not yet run'
_NAMES = '|'.join(FIELDS)
_COMMAND = re.compile(r'^(?=python (?:-m|tests/))', re.MULTILINE)
_FIELD = re.compile(rf'\b({_NAMES}):\s+(.*?)\.?(?=\s+(?:{_NAMES}):|\s*\n\s*\n|\s*\Z)', re.DOTALL)

TOP = """# Results

Made by `python tests/benchmarks/results.py` from the headers of the experiments, which say more.
What nobody has run is not in the table.

| command | result | published | curve | hardware | time |
|---|---|---|---|---|---|
"""


def rows(text: str) -> list[dict[str, str]]:
  """For each command in the header of an experiment itself, 'command', and the fields there are."""
  found = []
  for part in _COMMAND.split(ast.get_docstring(ast.parse(text)))[1:]:
    command, _, rest = part.partition('\n')
    first = reversed(_FIELD.findall(rest))  # prose that follows may have such words again
    fields = {name: ' '.join(value.split()) for name, value in first}
    found.append({'command': command, **fields})
  return found


def table() -> str:
  texts = [path.read_text(encoding='utf-8') for path in sorted(FILE.parent.rglob('*.py'))]
  all_rows = [row for text in texts for row in rows(text)]
  lines, left = [], []
  for row in all_rows:
    if NOT_RUN in row['Result']:
      left.append(f'* `{row["command"]}`\n')
    else:
      cells = [f'`{row["command"]}`', *(row.get(name, '') for name in FIELDS)]
      lines.append(f'| {" | ".join(cell.replace("|", chr(92) + "|") for cell in cells)} |\n')
  return ''.join([TOP, *lines, '\nNot yet run:\n\n', *left])


if __name__ == '__main__':
  FILE.write_text(table(), encoding='utf-8')
