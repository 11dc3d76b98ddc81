"""Strict numerics on eight CPU devices, and a small corpus with experiments on it."""

import os

from tests import xla_flags

# Before JAX is imported anywhere.  Programs of toys compile faster when XLA optimises little.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = xla_flags(8)
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
# Programs are compiled for TPUs that are not here, by several processes at once.
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
# No test may depend on data sets that this machine happens to have.
os.environ['TFDS_DATA_DIR'] = '/nonexistent'

import atexit
import pathlib
import random
import shutil
import signal
import tempfile

import jax
import pytest

from lmjax import config, experiment, hardware

jax.config.update('jax_numpy_rank_promotion', 'raise')
# The workers of a run, which inherit the environment, compile each program once.
if 'LMJAX_TEST_PROGRAMS' not in os.environ:
  os.environ['LMJAX_TEST_PROGRAMS'] = tempfile.mkdtemp(prefix='lmjax-tests-')
  atexit.register(shutil.rmtree, os.environ['LMJAX_TEST_PROGRAMS'], ignore_errors=True)
jax.config.update('jax_compilation_cache_dir', os.environ['LMJAX_TEST_PROGRAMS'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)

WORDS = (
  'the a one this that river stone house light engine garden letter captain winter music table '
  'walked carried opened found remembered asked wrote followed under over beside through quietly '
  'slowly never always green heavy small old bright'
).split()


def tpus(topology: str) -> list[jax.Device]:
  """Devices to compile for, which are not here."""
  pytest.importorskip('libtpu', reason='the compiler for TPUs runs on Linux and x86-64 only')
  return hardware.devices(topology)


def documents(n: int, seed: int = 0) -> list[str]:
  """Texts of 3 to 12 sentences of 3 to 9 words; some letters have accents."""
  rng = random.Random(seed)
  sentence = lambda: ' '.join(rng.choices(WORDS, k=rng.randint(3, 9))).capitalize() + '.'
  return [' '.join(sentence() for _ in range(rng.randint(3, 12))) + ' Café.' for _ in range(n)]


@pytest.fixture(autouse=True)
def heard():
  """What is begun under nohup, or in the background of a script, would not hear of these."""
  default = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
  before = {number: signal.getsignal(number) for number in default}
  ignored = [number for number, handler in before.items() if handler is signal.SIG_IGN]
  for number in ignored:
    signal.signal(number, default[number])
  yield
  for number in ignored:
    signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory) -> pathlib.Path:
  """A directory with train.txt and valid.txt, one document a line, and a cache."""
  root = tmp_path_factory.mktemp('corpus')
  (root / 'train.txt').write_text('\n'.join(documents(60)), encoding='utf-8')
  (root / 'valid.txt').write_text('\n'.join(documents(12, seed=1)), encoding='utf-8')
  (root / 'cache').mkdir()
  (root / 'cache' / 'xla').symlink_to(os.environ['LMJAX_TEST_PROGRAMS'])
  return root


@pytest.fixture(scope='session')
def tiny(corpus):
  """tiny(objective='clm', **{'model.depth': 3}) -> a resolved config of a small experiment."""

  def make(objective: str = 'clm', **overrides) -> dict:
    c = config.base(objective=objective, tokenizer='bytes')
    c.steps, c.batch, c.length, c.check = 6, 8, 48, False
    c.cache = str(corpus / 'cache')
    c.data.update(train=str(corpus / 'train.txt'), document='line')
    c.data.eval = {'valid': str(corpus / 'valid.txt')}
    c.model.update(depth=2, dim=16, heads=2)
    c.optimizer.update(lr=1e-2, warmup_steps=2)
    c.checkpoint.every, c.evaluate.every, c.log.every = 3, 3, 1
    c.log.tensorboard = False
    with c.unlocked():
      c.update_from_flattened_dict(overrides)
    return config.resolve(c)

  return make


@pytest.fixture(scope='session')
def parts(tiny):
  """parts(objective, **overrides) -> the Experiment of `tiny`."""
  return lambda *args, **overrides: experiment.prepare(tiny(*args, **overrides))
