"""Looks at the data of an experiment:  python -m lmjax.data build|show --config FILE.py

build: makes the tokenizer and the token stores ahead of time, and says what they hold.
show: the first rows that training sees, token by token, and numbers about all of the data; with
--html FILE.html as a page to look at in a browser.
"""

import contextlib
import os
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping

from absl import flags
from ml_collections import config_flags

from lmjax import command, config, experiment, terminal
from lmjax.data import loader, statistics
from lmjax.data.show import Row, legend, on_terminal, page, row, table_on_terminal
from lmjax.errors import UserError


def build(parts: experiment.Experiment, digests: Mapping[str, str]) -> None:
  t = parts.tokenizer
  print(f'tokenizer {t.name}: {t.vocab_size:,} ids, fingerprint {digests["tokenizer"]}')
  for name, store in parts.stores.items():
    examples = parts.examples(name)
    text = statistics.is_text(statistics.sample(examples)).mean()
    tokens, rows = len(store), len(examples)
    print(
      f'{name}: {store.num_documents:,} documents, {store.num_bytes:,} bytes, {tokens:,} tokens '
      f'({store.num_bytes / tokens:.2f} bytes each), {rows:,} rows of {parts.config["length"]}, '
      f'{text:.1%} of them text; digest {digests[name]}; {store.path}'
    )


def rows(parts: experiment.Experiment, count: int) -> Iterator[tuple[str, Row]]:
  """The first that training sees, with titles."""
  one_by_one = loader.Loader(parts.examples('train'), 1, parts.config['seed'])
  for number in range(count):
    step, place = divmod(number, parts.config['batch'])
    yield f'Row {place} of step {step}', row(one_by_one.batch(number), 0, parts.tokenizer)


def tables(parts: experiment.Experiment) -> list[statistics.Table]:
  asked = {key: x for key, x in parts.config['objective'].items() if key in statistics.ASKED}
  examples = parts.examples('train')
  return statistics.tables(parts.tokenizer, parts.sources, parts.stores, examples, asked)


def show(parts: experiment.Experiment, count: int, out: str) -> None:
  made, of = tables(parts), list(rows(parts, count))
  if out:
    with open(out, 'w', encoding='utf-8', errors='backslashreplace') as file:
      file.writelines(page(f'{parts.sources["train"].spec} as the model sees it', made, of))
    print(f'{count} rows and the numbers are in {out}')
    return
  colour, width = terminal.has_colours(), shutil.get_terminal_size((100, 0)).columns
  sys.stdout.reconfigure(errors='backslashreplace')  # not every encoding has all characters
  for table in made:
    print(*table_on_terminal(table, width, colour), '', sep='\n')
  print(*textwrap.wrap(legend(about for _, about in of), width), sep='\n')
  for title, about in of:
    print(f'\n{title}', *on_terminal(about, width, colour), sep='\n')


def main() -> None:
  doing, f = sys.argv[1], flags.FLAGS
  if f.config is None:
    raise UserError('name an experiment with --config FILE.py[:ARGUMENT]')
  if doing == 'show':
    _check(f.rows, f.html)
  with contextlib.redirect_stdout(sys.stderr):  # what is being made is no part of the report
    parts = experiment.prepare(config.resolve(f.config))
    digests = parts.digests
  if doing == 'build':
    build(parts, digests)
  else:
    show(parts, f.rows, f.html)


def _check(count: int, out: str) -> None:
  if count < 1:
    raise UserError(f'--rows={count} must be at least 1')
  path = pathlib.Path(out).absolute()
  if out and path.suffix not in ('.html', '.htm'):
    raise UserError(f'--html={out} does not end in .html: only such a file is overwritten')
  if out and not path.parent.is_dir():
    raise UserError(f'there is no directory {path.parent} for --html')
  if out and path.is_dir():
    raise UserError(f'--html={out} is a directory')
  if out and not os.access(path if path.exists() else path.parent, os.W_OK):
    raise UserError(f'--html={out} cannot be written: permission denied')


if __name__ == '__main__':
  if '--help' in sys.argv:
    print(__doc__)
    sys.exit()
  if sys.argv[1:2] not in (['build'], ['show']):
    terminal.say('say what to do: build or show')
    sys.exit(2)
  config_flags.DEFINE_config_file('config', None, 'The experiment: FILE.py[:ARGUMENT].')
  if sys.argv[1] == 'show':
    flags.DEFINE_integer('rows', 3, 'How many rows to show.')
    flags.DEFINE_string('html', '', 'A file to write them to, as a page for a browser.')
  command.run(main, sys.argv[:1] + sys.argv[2:])
