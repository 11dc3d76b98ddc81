"""The table of results says what the headers of the experiments say."""

import pytest

from tests.benchmarks import results

HEADER = '''"""What it is.

python -m lmjax.main --config experiments/a.py:b --workdir DIR
Hardware: 2 cores.  Time: 3 s.  Result:
1.5 nats, of much text.
Published: 1.4 (somebody, 2019).

Prose about the Result: it is no part of it.

python -m lmjax.main --config experiments/a.py:c --workdir DIR

Hardware: TOPOLOGIES.  Time: not yet run.  Result: not yet run.
"""
'''


def test_rows_of_a_header():
  command = 'python -m lmjax.main --config experiments/a.py:{} --workdir DIR'.format
  first, second = results.rows(HEADER)
  assert first == {
    'command': command('b'),
    'Hardware': '2 cores',
    'Time': '3 s',
    'Result': '1.5 nats, of much text',
    'Published': '1.4 (somebody, 2019)',
  }
  assert second == {
    'command': command('c'),
    'Hardware': 'TOPOLOGIES',
    'Time': 'not yet run',
    'Result': 'not yet run',
  }


@pytest.mark.parametrize('path', sorted(results.FILE.parent.rglob('*.py')), ids=lambda p: p.name)
def test_every_row_has_what_the_table_needs(path):
  found = results.rows(path.read_text())
  assert found
  for row in found:
    assert row.keys() >= {'Hardware', 'Time', 'Result'}, row['command']


def test_the_table_is_what_the_headers_say():
  again = 'python tests/benchmarks/results.py'
  assert results.FILE.read_text() == results.table(), f'the headers say something else: run {again}'
