"""The notebooks run from their first cell to their last, and are kept without what they print."""

import json
import pathlib
import re
import sys

import nbclient
import nbformat
import pytest
from IPython import display

from lmjax import live
from lmjax.errors import UserError
from tests import xla_flags

COLAB = pathlib.Path(__file__).parent.parent / 'experiments' / 'colab'
# Name -> what its cells must have shown.
NOTEBOOKS = {
  'train_a_gpt': ['image/svg+xml', 'def main(', 'eval/validation/bits_per_byte'],
  'bert_and_what_it_learned': [
    'image/svg+xml',
    'image/png',
    'not [MASK], an error',
    'mlm_accuracy',
  ],
  'your_first_ablation': ['<iframe srcdoc=', 'beside model.positions=learned', "'verdict': '"],
}
# A line of the experiment -> one that is over soon, and shows as well that everything works.
SHORT = {
  r'c\.steps = \d+': 'c.steps, c.check = 2, False',
  r'c\.evaluate\.batches = \d+': 'c.evaluate.batches = 1',
}


def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(COLAB / f'{name}.ipynb', as_version=4)


def test_all_notebooks_are_run_here():
  assert {path.stem for path in COLAB.iterdir()} == NOTEBOOKS.keys()


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs_and_says_what_it_needs(name):
  cells = [cell for cell in read(name).cells if cell.cell_type == 'code']
  assert not any(cell.outputs or cell.execution_count for cell in cells)
  install, *others = (cell for cell in cells if '%pip' in cell.source)
  assert not others
  assert install.metadata.tags == ['install']
  needed = re.findall(r"'([^']+)'", install.source)
  assert needed
  assert all('==' in one for one in needed)


def test_outside_a_notebook_there_is_nothing_to_draw_in(tmp_path):
  with pytest.raises(UserError, match=r'lmjax\.train\.run trains'):
    live.train('experiments/quickstart.py', tmp_path / 'run')
  assert not (tmp_path / 'run.log').exists()


def test_a_run_that_does_not_come_to_its_end_says_why(tmp_path, monkeypatch):
  monkeypatch.setattr(display, 'display', lambda *_, **__: display.DisplayHandle())
  with pytest.raises(UserError, match=r'no "steeps" in the config .did you mean "steps"'):
    live.train('experiments/quickstart.py', tmp_path / 'run', {'steeps': 3})
  assert 'steeps' in (tmp_path / 'run.log').read_text()


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
  notebook = read(name)
  notebook.cells = [c for c in notebook.cells if 'install' not in c.metadata.get('tags', ())]
  (experiment,) = (cell for cell in notebook.cells if cell.source.startswith('%%writefile'))
  for line, short in SHORT.items():
    experiment.source, count = re.subn(line, short, experiment.source)
    assert count == 1, line
  monkeypatch.setenv('XLA_FLAGS', xla_flags(1))
  monkeypatch.setenv('PATH', f'{pathlib.Path(sys.executable).parent}:/usr/bin:/bin')
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
  place = {'metadata': {'path': tmp_path}}
  nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3', resources=place).execute()
  printed = json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == 'code'])
  for what in NOTEBOOKS[name]:
    assert what in printed
