"""The plan of the house: who imports whom, how large rooms are, what happens at import."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'lmjax'
FILES = sorted(PACKAGE.rglob('*.py'))

# Floor by floor; a room imports only from floors below, and never sideways.  A list inside a floor
# is a stair: its rooms may import those before them.
FLOORS = [
  [
    [
      *(
        'errors',
        'terminal',
        'schema',
        'sweep',
        'config',
        'rollcall',
        'processes',
        'jsonio',
        'command',
        'metrics',
      ),
      *('hardware', 'roofline', 'profiler', 'fingerprint', 'offload', 'guard', 'stopping'),
      'goodput',
      *('hlo', 'hlo.text', 'hlo.collectives', 'hlo.costs', 'hlo.buffers', 'hlo.facts'),
    ],
  ],
  [
    [
      *('data.streams', 'data.files', 'data.python_corpus', 'data.sources'),
      *('data.pieces', 'data.tokenizer', 'data.cache', 'data.building', 'data.store', 'data.pack'),
      *('data.overlap', 'data.statistics', 'data.show'),
    ],
    ['data.corrupt', 'data.loader'],
    [
      *('models.products', 'models.shards', 'models.layers', 'models.positions', 'models.flash'),
      *('models.attention', 'models.transformer'),
    ],
    ['models.heads'],
    ['models'],
    ['data'],
    ['optimizer'],
    ['sharding'],
    ['steps', 'disk', 'checkpoint'],
    ['record'],
    ['ablate.verdicts', 'ablate.statistics'],
    ['huggingface.weights'],
  ],
  [
    ['objectives', 'objectives.clm'],
    ['objectives.mlm'],
    *(['huggingface.bert'], ['huggingface.gpt2'], ['huggingface.llama'], ['huggingface.roberta']),
    ['huggingface.tokens'],
  ],
  [
    [
      'canonical',
      'experiment',
      'workdir',
      'yardstick',
      'evaluate',
      'generate',
      'state',
      'saving',
      'step',
      *('check.twin', 'check.examples', 'check.seeing', 'check.learning', 'check'),
      'check.resume',
      'train',
      'plan',
      'plan.search',
      'plan.measure',
      'huggingface',
      'live',
      *('ablate.numbers', 'ablate.content', 'ablate.plots', 'ablate.page', 'ablate.markdown'),
      *(
        'ablate.arms',
        'ablate.matching',
        'ablate.fixed',
        'ablate.seed',
        'ablate.vmapped',
        'ablate.slots',
        'ablate.runs',
        'ablate.caveats',
        'ablate.report',
        'ablate',
        'ablate.budget',
      ),
    ]
  ],
  [
    *(['main'], ['check.__main__'], ['data.__main__'], ['plan.__main__']),
    *(['huggingface.__main__'], ['ablate.__main__']),
  ],
]
# Commands, and what writes an experiment file.
MAY_NAME_IT = ('main', 'check.__main__', 'workdir', 'data.__main__')
MAY_NAME_IT += ('ablate.__main__', 'ablate.vmapped')
# heads builds on layers, and stands beside the cores.
ALLOWED = {('models.heads', f'models.{room}') for room in ('layers', 'products', 'shards')}


def name_of(path: pathlib.Path) -> str:
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(path: pathlib.Path) -> set[str]:
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  rooms = {name_of(f) for f in FILES}
  found = {f.removeprefix('lmjax.') for f in found if f.startswith('lmjax.')}
  return {f if f in rooms else f.rpartition('.')[0] for f in found} - {''}


def place(room: str) -> tuple[int, int, int]:
  for floor, stairs in enumerate(FLOORS):
    for stair, rooms in enumerate(stairs):
      if room in rooms:
        return floor, stair, rooms.index(room)
  raise AssertionError(f'{room} has no place in the house: give it one in FLOORS')


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_imports_go_down(path):
  room = name_of(path)
  if not room:
    return
  floor, stair, step = place(room)
  for other in imports(path) - {room}:
    there = place(other)
    down = there[0] < floor or (there[:2] == (floor, stair) and there[2] < step)
    assert down or (room, other) in ALLOWED, f'{room} imports {other}, which is not below it'


@pytest.mark.parametrize('path', sorted((ROOT / 'experiments').rglob('*.py')), ids=lambda p: p.stem)
def test_experiments_import_only_the_config(path):
  assert imports(path) <= {'config'}
  assert not re.search(r'^(import|from) (jax|flax|optax|numpy)', path.read_text(), re.M)


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_rooms_are_small(path):
  text = path.read_text()
  assert text.count('\n') <= 300
  assert path.stem not in ('utils', 'common', 'base', 'helpers', 'misc')
  longest = 90 if path.stem == 'train' else 60
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      lines = node.end_lineno - node.lineno + 1
      assert lines <= longest, f'{node.name} has {lines} lines'


def test_main_is_only_flags():
  assert (PACKAGE / 'main.py').read_text().count('\n') <= 60


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_models_know_no_mesh_and_catch_nothing(path):
  text, room = path.read_text(), name_of(path)
  if room.startswith(('models', 'objectives')):
    assert not re.search(r"'(replica|data|sequence|model)'", text)
    assert not re.search(r'^\s*except\b', text, re.M)
  if room not in ('config', 'schema'):
    assert 'ml_collections' not in text or room in MAY_NAME_IT


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_public_signatures_are_annotated(path):
  for node in ast.parse(path.read_text()).body:
    for function in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
      if isinstance(function, ast.FunctionDef) and not function.name.startswith('_'):
        missing = [
          a.arg
          for a in function.args.args + function.args.kwonlyargs
          if a.annotation is None and a.arg not in ('self', 'cls')
        ]
        assert not missing, f'{function.name}: {missing}'


def test_no_code_is_run_from_data():
  banned = re.compile(r'\b(pickle\.load|exec\(|eval\(|marshal|dill)|allow_pickle=True')
  for path in FILES:
    assert not banned.search(path.read_text()), path


def test_importing_everything_starts_no_backend():
  modules = [f'lmjax.{name_of(p)}' for p in FILES if name_of(p) and p.stem != '__main__']
  code = (
    'import importlib\n'
    f'for m in {modules}: importlib.import_module(m)\n'
    'from jax._src import xla_bridge\n'
    'assert not xla_bridge.backends_are_initialized()\n'
  )
  subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, timeout=120)


def test_config_imports_no_jax():
  code = (
    'import sys\nfrom lmjax import config\n'
    "config.resolve(config.load('experiments/bert.py:tiny', {'steps': 20_000}))\n"
    "assert not {'jax', 'flax', 'numpy'} & set(sys.modules), sys.modules.keys()\n"
  )
  subprocess.run([sys.executable, '-c', code], check=True, timeout=60, cwd=ROOT)
