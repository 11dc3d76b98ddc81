"""A config is what its author meant, or it is refused."""

import ast

import pytest

from lmjax import config, models, objectives, schema
from lmjax.errors import UserError
from lmjax.optimizer import Optimizer

QUICK = 'experiments/quickstart.py'
BASE = 'from lmjax import config\ndef get_config():\n  c = config.base()\n'


def leaves(tree, prefix=''):
  for key, value in tree.items():
    if isinstance(value, dict) and prefix + key not in config.OPEN:
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


DEFAULTS = [(kind, config.base(objective=kind).to_dict()) for kind in ('clm', 'mlm')]
KEYS = sorted({(kind, key) for kind, tree in DEFAULTS for key, _ in leaves(tree)})


def changed(kind: str, path: str, edit) -> dict:
  tree = config.base(objective=kind).to_dict()
  *sections, last = path.split('.')
  inner = tree
  for section in sections:
    inner = inner[section]
  edit(inner, last)
  return tree


@pytest.mark.parametrize(('kind', 'path'), KEYS, ids=lambda x: x)
def test_every_key_misspelled_is_refused_with_the_nearest(kind, path):
  wrong = path[:-1] + path[-2] if path[-1] != path[-2] else path + 'q'

  def edit(tree, key):
    tree[wrong.split('.')[-1]] = tree.pop(key)

  with pytest.raises(UserError, match=r'there is no|has no') as error:
    config.resolve(changed(kind, path, edit))
  # Without its name a section is taken for the default one, and may be refused for another key.
  assert wrong.split('.')[-1] in str(error.value) or path.endswith('.name')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('kind', 'path'), KEYS, ids=lambda x: x)
def test_every_key_of_a_wrong_type_is_refused(kind, path):
  def edit(tree, key):
    tree[key] = ['wrong']

  with pytest.raises(UserError, match=path.split('.')[-1]):
    config.resolve(changed(kind, path, edit))


@pytest.mark.parametrize(
  ('path', 'value', 'said'),
  [
    ('steps', 7.5, 'steps = 7.5 is not int'),
    ('steps', 0, 'steps = 0 must be at least 1'),
    ('steps', 1 << 31, r'steps = 2147483648 must be below 2\^31'),
    ('batch', -1, 'batch = -1 must be at least 1'),
    ('steps', True, 'steps = True is not int'),
    ('optimizer.lr', float('nan'), 'not a finite number'),
    ('optimizer.lr', 'fast', "optimizer.lr = 'fast' is not float"),
    ('model', 3, 'model = 3 is not a section'),
    ('objective.name', 'clam', 'did you mean "clm"'),
    ('model.name', 'transfomer', 'did you mean "transformer"'),
    ('tokenizer.name', 'byte', 'did you mean "bytes"'),
  ],
)
def test_wrong_values(path, value, said):
  def edit(tree, key):
    tree[key] = value

  with pytest.raises(UserError, match=said):
    config.resolve(changed('clm', path, edit))


def test_a_section_given_in_part_is_completed():
  c = config.base().to_dict()
  c['objective'] = {'name': 'mlm', 'rate': 0.3}
  del c['optimizer'], c['steps']
  resolved = config.resolve(c)
  assert resolved['objective']['rate'] == 0.3
  assert resolved['objective']['mask_share'] == 0.8
  assert resolved['optimizer']['name'] == 'adamw'
  assert resolved['steps'] == 1000


def test_the_knobs_are_those_of_the_rooms():
  """Every key is read, because the thing that it configures takes exactly these keys."""
  for kind, _ in DEFAULTS:
    c = config.resolve(config.base(objective=kind))
    objectives.get(**c['objective'])
    Optimizer(**c['optimizer'])
    models.get(**c['model'] | {'size': 'bert_tiny', 'max_length': 8})
  with pytest.raises(TypeError, match='unheard_of'):
    objectives.get(**c['objective'], unheard_of=1)
  with pytest.raises(TypeError, match='unheard_of'):
    models.get(**c['model'] | {'size': 'bert_tiny'}, unheard_of=1)


def test_a_knob_of_another_type_is_named():
  field = ast.parse('rates: tuple[float, ...] = ()').body[0]
  with pytest.raises(TypeError, match=r'not tuple\[float, \.\.\.\]'):
    schema._knob(field.annotation, field.value)


def test_top_level_keys_are_read():
  """Every other key occurs in the library by name."""
  import pathlib

  text = ''.join(p.read_text() for p in pathlib.Path('lmjax').rglob('*.py') if p.stem != 'config')
  for path, _ in leaves(config.base().to_dict()):
    section, _, key = path.rpartition('.')
    if section in ('', 'data', 'sharding', 'checkpoint', 'evaluate', 'log') or '.' not in path:
      assert f"'{key or path}'" in text, path


def test_overrides_are_typed():
  c = config.load(QUICK, {'steps': 7, 'model.heads': 2, 'optimizer.lr': 1, 'model.scan': True})
  assert (c.steps, c.model.heads, c.optimizer.lr, c.model.scan) == (7, 2, 1.0, True)


@pytest.mark.parametrize(
  ('spec', 'overrides', 'said'),
  [
    ('experiments/none.py', {}, 'there is no config file'),
    ('experiments/quickstart.py:bart', {}, 'did you mean "bert"'),
    (QUICK, {'stepz': 3}, 'there is no "stepz" in the config.*did you mean "steps"'),
    (QUICK, {'optimiser.lr': 3}, 'there is no "optimiser".*did you mean "optimizer"'),
    (QUICK, {'optimizer.le': 3}, 'there is no "optimizer.le".*did you mean "lr"'),
    (QUICK, {'optimizer.lr.x': 3}, 'there is no "optimizer.lr.x"'),
    (QUICK, {'steps': 7.5}, '^--config.steps=7.5 is no whole number$'),
    (QUICK, {'steps': '1e3'}, '^--config.steps=1e3 is no whole number$'),
    (QUICK, {'model.kv_heads': 'two: 2'}, '^--config.model.kv_heads=two: 2 is no whole number$'),
    (QUICK, {'optimizer.lr': 'fast'}, '^--config.optimizer.lr=fast is no number$'),
    (QUICK, {'model.scan': 'maybe'}, '^--config.model.scan=maybe is neither True nor False$'),
    (QUICK, {'model': 3}, '^--config.model=3 is no dict: give it as {"name": …}$'),
    (
      QUICK,
      {'data.eval': '/a: b'},
      '^--config.data.eval=/a: b is no dict: give it as {"name": …}$',
    ),
    (QUICK, {'data.eval': '{'}, '^--config.data.eval={ is no dict: give it as {"name": …}$'),
    (QUICK, {'optimizer.args.b3': 3}, r'as a whole: --config.optimizer.args=\'{"b3": '),
    ('experiments/ablations/mask_rate.py:high', {}, 'takes no argument, and "high" was given'),
  ],
)
def test_mistakes_on_the_command_line(spec, overrides, said):
  with pytest.raises(UserError, match=said):
    config.load(spec, overrides)


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('def get_config(:', 'line 1: SyntaxError'),
    ('x = 1', 'AttributeError'),
    ('def get_config():\n  return 1 / 0', 'line 2: ZeroDivisionError'),
    ('def get_config():\n  return {}', 'not a ConfigDict'),
    (
      BASE + '  c.optimzer = 3\n  return c',
      'line 4: AttributeError: Key "optimzer" does not exist.*"optimizer"',
    ),
    (
      BASE + '  c.model.dim = "x"\n  return c',
      'line 4: TypeError',
    ),
  ],
)
@pytest.mark.parametrize('file', ['broken.py', '{}/broken.py'])
def test_mistakes_in_the_file_name_file_and_line(tmp_path, monkeypatch, text, said, file):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'broken.py').write_text(text)
  with pytest.raises(UserError, match=said) as error:
    config.load(file.format(tmp_path))
  assert 'broken.py' in str(error.value)
  assert '\n' not in str(error.value)


def test_sweeps():
  rates = {'a': [1, 2]}
  assert config.product(rates, {'b': [3, 4]}) == [
    {'a': 1, 'b': 3},
    {'a': 1, 'b': 4},
    {'a': 2, 'b': 3},
    {'a': 2, 'b': 4},
  ]
  assert config.zipped({'a': [1, 2], 'b': [3, 4]}) == [{'a': 1, 'b': 3}, {'a': 2, 'b': 4}]
  assert config.chain(rates, [{'c': 5}]) == [{'a': 1}, {'a': 2}, {'c': 5}]
  with pytest.raises(ValueError, match='argument 2 is shorter'):
    config.zipped({'a': [1, 2], 'b': [3]})
  assert config.arguments({'a.b': 0.3}) == ['--config.a.b=0.3']


def test_another_kind_is_given_as_a_whole():
  with pytest.raises(UserError) as error:
    config.resolve(config.load(QUICK, {'tokenizer.name': 'wordpiece'}))
  wanted = """another kind is given as a whole: --config.tokenizer='{"name": "wordpiece", …}'"""
  assert str(error.value).endswith(wanted)
  made = config.load(QUICK, {'tokenizer': '{"name": "wordpiece", "vocab_size": 4000}'})
  assert config.resolve(made)['tokenizer']['name'] == 'wordpiece'
