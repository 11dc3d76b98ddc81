"""Every experiment loads, says how it is run, fits together and compiles; sweeps name real keys."""

import ast
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import pytest

from lmjax import check, config, experiment, hardware, plan, sharding, train

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
  command = 'ablate' if 'ablations' in path.parts else 'main'
  assert f'python -m lmjax.{command} --config {path}' in text
  for word in ('Hardware:', 'Time:', 'Result:'):
    assert word in text
  assert path.read_text().count('\n') <= 70


def here(topology: str) -> str:
  """CPUs in place of GPUs, whose compiler few have."""
  return topology.replace('h100', 'cpu')


def lowered(spec: str, topology: str, **overrides):
  """The train step as it would be on the topology, with what the experiment says of it."""
  meant = config.declared(spec, 'TOPOLOGIES', {})[topology]
  job = plan.Job(spec, meant | overrides, here(topology))
  if topology[0] == 'v':
    pytest.importorskip('libtpu')
  parts, mesh = plan.made(job)
  strategy = parts.config['sharding']['strategy']
  with jax.set_mesh(mesh), sharding.logical_axes(strategy):
    like, transform, _ = train.init_state(parts, mesh)
    return train.lower(parts, mesh, like, transform)


def kind(spec: str, arm: Mapping[str, Any] | None = None) -> str:
  """What decides a program, or a twin: data and cadences do not."""
  c = config.resolve(config.load(spec, arm))
  for key in ('data', 'cache', 'log', 'checkpoint', 'evaluate'):
    del c[key]
  return json.dumps(c, sort_keys=True)


def of_one_kind(specs: Iterable[str]) -> dict[str, str]:
  """Kind -> the first that is of it."""
  return {kind(spec): spec for spec in reversed(list(specs))}


MEANT = [(str(path), topology) for path in FILES for topology in MODULES[path].TOPOLOGIES]
FIRST = dict(reversed(MEANT))
OF_VARIANTS = [(spec, FIRST[spec.partition(':')[0]]) for spec in VARIANTS]


@pytest.mark.parametrize(
  ('spec', 'topology'), [*OF_VARIANTS, *(x for x in MEANT if x[1] != FIRST[x[0]])]
)
def test_every_variant_and_every_topology_lowers(spec, topology):
  """The whole program at its full size, traced; compiling is what the next test does."""
  assert lowered(spec, topology).as_text().startswith('module')


@pytest.mark.parametrize('spec', of_one_kind(dict(MEANT)).values())
def test_one_variant_compiles(spec):
  """Ahead of time, two narrow blocks and few rows: at full size it takes minutes."""
  topology, meant = next(iter(MODULES[pathlib.Path(spec)].TOPOLOGIES.items()))
  small = {'model.depth': 2, 'model.dim': 256, 'model.heads': 8, 'tokenizer.vocab_size': 1024}
  rows = len(hardware.devices(here(topology))) * meant.get('micro_batches', 1)
  small |= {'length': 128, 'batch': rows} if topology[0] == 'v' else {'length': 64, 'batch': 16}
  small |= {'model.ffn_dim': 512} if 'gpt_' in spec else {}
  small |= {'objective.predictions': 20} if spec == 'experiments/bert.py' else {}
  if 'shakespeare' in spec:  # its vocabulary is found in the text
    del small['tokenizer.vocab_size']
  assert lowered(spec, topology, **small).compile().cost_analysis()['flops'] > 0


@pytest.mark.parametrize('path', [p for p in FILES if hasattr(MODULES[p], 'sweep')], ids=str)
def test_every_swept_key_exists_and_every_arm_lowers(path):
  arms = MODULES[path].sweep()
  assert len(arms) > 1
  assert len({tuple(sorted(arm.items())) for arm in arms}) == len(arms)
  for arm in arms:
    experiment.sketch(config.resolve(config.load(str(path), arm)))
  alike = {kind(str(path), arm | {'optimizer.lr': 1e-3}): arm for arm in arms}
  for arm in alike.values():
    lowered(str(path), FIRST[str(path)], **arm)


# Variants that differ from the first one of their file in more than their sizes, which twins have
# not.  Arms of sweeps are examined where they are run, before they begin.
OTHERS = ['quickstart.py:bert', 'ablations/gpt_bert.py:bert', 'shakespeare_char.py:cpu']
OTHERS = [f'experiments/{spec}' for spec in [*OTHERS, 'shakespeare_char.py:cpu_best']]


@pytest.mark.parametrize('spec', of_one_kind([*dict(MEANT), *OTHERS]).values())
def test_the_oracles_hold(spec):
  findings = check.examine(config.resolve(config.load(spec)))
  failures = [check.line(*pair) for pair in findings if pair[1].holds is False]
  assert not failures, '\n'.join(failures)
