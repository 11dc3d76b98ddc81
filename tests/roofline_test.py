"""Which resource a transfer keeps busy, and for how long."""

import jax
import numpy as np
import pytest

from lmjax import hardware, roofline, sharding
from lmjax.errors import UserError
from tests.conftest import tpus

SIZES = dict.fromkeys(sharding.MESH_AXES, 1)
# topology -> (mesh, a group as the mesh axis along which it lies, resource, GB/s that each sends)
WAYS = [
  ('v5e:4x4', {'data': 4, 'model': 4}, 'data', 'links', 50),  # a line: of one dimension, one way
  ('v5e:4x4', {'data': 16}, 'data', 'links', 100),  # two such
  ('v5e:16x16', {'data': 16, 'model': 16}, 'model', 'links', 100),  # a ring
  ('v5p:4x4x4', {'data': 16, 'model': 4}, 'model', 'links', 200),
  ('v5e:2x2@2', {'replica': 2, 'data': 4}, 'replica', 'network', 3.125),
  ('v5e:2x2@2', {'replica': 2, 'data': 4}, 'data', 'links', 100),
]


@pytest.mark.parametrize(('topology', 'sizes', 'axis', 'resource', 'rate'), WAYS)
def test_transfers_take_the_links_that_there_are(topology, sizes, axis, resource, rate):
  pytest.importorskip('libtpu')
  mesh = sharding.make_mesh(SIZES | sizes, hardware.devices(topology))
  places = np.arange(mesh.size).reshape(mesh.devices.shape)
  at = [slice(None) if name == axis else 0 for name in mesh.axis_names]
  group = [int(i) for i in places[tuple(at)].ravel()]
  assert roofline.axes(group, mesh) == axis
  busy = roofline.seconds(0, 0, [(1e9, group)], mesh, hardware.chip(topology))
  assert busy.pop(resource) == pytest.approx(1 / rate)
  assert not any(busy.values())


def test_products_and_memory_at_the_makers_word():
  mesh = sharding.make_mesh(SIZES | {'data': 8}, tpus('v5e:2x4'))
  busy = roofline.seconds(197e12, 2 * 819e9, [], mesh, hardware.chip('v5e:2x4'))
  assert busy == {'compute': 1, 'memory': 2, 'links': 0, 'network': 0}


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    *((chip.kind, name) for name, chip in hardware.CHIPS.items() if chip.dims > 1),
    ('NVIDIA A100-SXM4-80GB', 'a100'),
    ('NVIDIA A100-SXM4-40GB', 'a100-40gb'),
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA H200', 'h200'),
    ('NVIDIA H100 PCIe', None),  # 756 TFLOP/s
    ('NVIDIA H100 NVL', None),
    ('NVIDIA L4', None),
    ('cpu', None),
  ],
)
def test_a_chip_is_known_by_its_kind(kind, name):
  stub = type('', (), {'device_kind': kind})
  assert hardware.chip_of(stub) is hardware.CHIPS.get(name)


@pytest.mark.parametrize(
  ('setting', 'share'),
  [
    ({}, 0.75),
    ({'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.5'}, 0.5),
    ({'XLA_CLIENT_MEM_FRACTION': '.9', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.5'}, 0.9),
  ],
)
def test_jax_takes_a_share_of_a_gpu(monkeypatch, setting, share):
  for name in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
    monkeypatch.delenv(name, raising=False)
  for name, value in setting.items():
    monkeypatch.setenv(name, value)
  hardware.chip.cache_clear()
  assert hardware.chip('h100:8').memory == share * hardware.CHIPS['h100'].memory
  monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '90%')
  hardware.chip.cache_clear()
  with pytest.raises(UserError, match='90% is no share'):
    hardware.chip('h100:8')


@pytest.mark.parametrize(
  ('topology', 'kind', 'count'),
  [
    ('v4:2x2x1', 'TPU v4', 4),
    ('v5e:1x1', 'TPU v5 lite', 1),
    ('v5e:4x4@2', 'TPU v5 lite', 32),
    ('v5p:2x2x2', 'TPU v5', 8),
    ('v6e:4x4', 'TPU v6 lite', 16),
    ('tpu7x:2x2x1', 'TPU7x', 8),
  ],
)
def test_tpus_that_are_not_here(topology, kind, count):
  pytest.importorskip('libtpu')
  devices = hardware.devices(topology)
  assert {device.device_kind for device in devices} == {kind}
  assert len(devices) == count


def test_cpus():
  assert hardware.devices('cpu:4') == jax.devices()[:4]
  chip = hardware.chip('cpu:4')
  assert 1e9 < chip.flops < 1e13
  assert chip.memory == hardware.chip('cpu:1').memory / 4


@pytest.mark.parametrize(
  ('topology', 'said'),
  [
    ('v5x:4x4', 'did you mean "v5'),
    ('v5e', 'write it as v5e:4x4'),
    ('v5e:4by4', 'write it as v5e:4x4'),
    ('v5e:3x5', 'is no topology'),
    ('v5e:4x4x4', 'v5e is a torus of 2 dimensions'),
    ('v5p:4x4', 'v5p is a torus of 3 dimensions'),
    ('v5e:4x4@0', 'or v5e:4x4@2 for two slices'),
    ('h100:12', 'or a multiple'),
    ('h100:x', 'or a multiple'),
    ('cpu:999', 'as in cpu:8'),
    ('cpu:0', 'as in cpu:8'),
    ('cpu', 'as in cpu:8'),
  ],
)
def test_what_is_no_topology_is_a_sentence(topology, said):
  with pytest.raises(hardware.UserError, match=said):
    hardware.devices(topology)


def test_a_compiler_that_is_not_here_is_a_sentence(monkeypatch):
  monkeypatch.setattr(hardware.importlib.util, 'find_spec', lambda _: None)
  for topology, extra in (('h100:8', 'gpu'), ('v5e:4x4', 'tpu')):
    with pytest.raises(hardware.UserError, match=rf"pip install -e '.\[{extra}\]'"):
      hardware.devices(topology)
