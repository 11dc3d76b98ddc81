"""Every experiment loads, says how it is run, fits together and compiles; sweeps name real keys."""

import ast
import importlib.util
import pathlib

import jax
import pytest

from lmjax import config, experiment, sharding, train

FILES = sorted(pathlib.Path('experiments').rglob('*.py'))


def load(path: pathlib.Path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


MODULES = {path: load(path) for path in FILES}
VARIANTS = [
  f'{path}:{variant}' if variant else str(path)
  for path, module in MODULES.items()
  for variant in getattr(module, 'VARIANTS', ('',))
]


@pytest.mark.parametrize('path', FILES, ids=str)
def test_docstring_has_command_hardware_time_and_result(path):
  text = ast.get_docstring(ast.parse(path.read_text()))
  assert f'python -m lmjax.main --config {path}' in text
  for word in ('Hardware:', 'Time:', 'Result:'):
    assert word in text
  assert path.read_text().count('\n') <= 70


def compiled(spec: str, **overrides):
  c = config.resolve(config.load(spec, overrides))
  parts = experiment.sketch(c)
  mesh = sharding.make_mesh()
  sharding.check_batch(
    c['batch'], c['micro_batches'], sharding.make_mesh(devices=jax.devices()[:4]), 'replicate'
  )
  with jax.set_mesh(mesh), sharding.logical_axes(c['sharding']['strategy']):
    like, transform, _ = train.init_state(parts, mesh)
    step = jax.jit(train.make_step(parts, transform), donate_argnums=0)
    return step.lower(like, parts.abstract_batch())


@pytest.mark.parametrize('spec', VARIANTS)
def test_every_variant_fits_together_and_lowers(spec):
  """The whole program at its full size, traced; compiling is what the next test does."""
  overrides = {} if 'shakespeare' in spec or 'quickstart' in spec else {'batch': 8}
  assert compiled(spec, **overrides).as_text().startswith('module')


@pytest.mark.parametrize('path', FILES, ids=str)
def test_one_variant_compiles(path):
  module = MODULES[path]
  variant = getattr(module, 'VARIANTS', ('',))[0]
  spec = f'{path}:{variant}' if variant else str(path)
  small = {'batch': 8, 'length': 64, 'model.depth': 2, 'model.dim': 64, 'model.heads': 4}
  # A short row has no room for as many predictions as the recipe's.
  small |= {'objective.predictions': 10} if 'bert.py' in spec and 'ro' not in spec else {}
  assert compiled(spec, **small).compile().cost_analysis()['flops'] > 0


@pytest.mark.parametrize('path', [p for p in FILES if hasattr(MODULES[p], 'sweep')], ids=str)
def test_every_swept_key_exists_and_every_arm_lowers(path):
  arms = MODULES[path].sweep()
  assert len(arms) > 1
  assert len({tuple(sorted(arm.items())) for arm in arms}) == len(arms)
  for arm in arms:
    compiled(str(path), **arm, **({'batch': 8} if 'batch' not in arm else {}))
