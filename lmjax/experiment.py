"""A configuration made into its parts.  Everything here happens before any device work."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from lmjax import canonical, guard, jsonio, metrics, models, objectives, processes, sharding
from lmjax.config import base, resolve
from lmjax.data import cache, loader, sources, store, tokenizer
from lmjax.data.pieces import Tokenizer
from lmjax.errors import UserError
from lmjax.optimizer import Optimizer


class Flops(NamedTuple):
  """Of the matrix products of a training step on the global batch, without recomputation."""

  dense: int  # of all but the attention weights' products, forward and backward
  seen: int  # of those, forward, for the pairs of places that the mask lets see each other
  every: int  # .. and for all pairs, which attention without a kernel computes

  @property
  def model(self) -> int:
    """What the mathematics asks for."""
    return self.dense + 3 * self.seen


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """The parts of a run, fitted together.  `config` is resolved: plain values, every key known.

  What takes time is made when it is first asked for.
  """

  config: Mapping[str, Any]
  objective: Any
  core: nn.Module
  optimizer: Optimizer
  sources: Mapping[str, Any]  # 'train' and the names of the evaluation sets
  saved_tokenizer: str = ''  # a directory to load the tokenizer from, instead of training it

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """Loaded, trained, or found trained in the cache; UserError where the objective misses one."""
    if self.saved_tokenizer:
      made = tokenizer.load(self.saved_tokenizer)
    else:
      made = cache.trained(self.config['tokenizer'], self.sources['train'], self.config['cache'])
    self.objective.check(made, self.config['length'], self.core)
    return made

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  @functools.cached_property
  def model(self) -> nn.Module:
    """From a batch to loss terms and metrics."""
    return self.objective.model(self.core, self.vocab_size)

  @functools.cached_property
  def stores(self) -> dict[str, store.Store]:
    """The token store of each source, built if it is not there yet."""
    built = {
      k: store.build(s, self.tokenizer, self.config['cache']) for k, s in self.sources.items()
    }
    length = self.config['length']
    if 'train' in built and len(built['train']) <= length:
      spec, size = self.sources['train'].spec, len(built['train'])
      raise UserError(f'{spec} holds {size} tokens: less than one window of length = {length}')
    return built

  @property
  def digests(self) -> dict[str, str]:
    """What the data are: name -> identity of a token store, and of the tokenizer.

    Each process has made or found its own; UserError where they differ.
    """
    stores = {name: store.digest for name, store in self.stores.items()}
    digests = {**stores, 'tokenizer': self.tokenizer.fingerprint}
    processes.check_same({f'the digest of {name}': x for name, x in digests.items()})
    return digests

  @functools.cached_property
  def examples(self) -> Callable[[str], Any]:
    """The objective's rows, by name, of the training source ('train') or of an evaluation set."""
    return functools.cache(self._examples)

  def _examples(self, name: str) -> Any:
    c, t, train = self.config, self.tokenizer, name == 'train'
    made = self.objective.examples(self.stores[name], t, c['length'], c['seed'], train)
    if not len(made):
      raise UserError(f'{self.sources[name].spec} is too short for a single example')
    return made

  def abstract_batch(self, train: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global batch, which are those of any text's."""
    c, t = self.config, self.tokenizer
    document = [np.flatnonzero(~t.special)[0]] * 8 + [t.eos]
    tokens, starts = np.array(document * 2), np.array([0, 9, 18])
    rows = self.objective.examples(
      store.Store([tokens], starts, starts[:-1], 16, ''), t, c['length'], c['seed'], train
    )(np.zeros(1, np.int64), np.zeros(1, np.int64))
    shape = lambda x: jax.ShapeDtypeStruct((self.config['batch'], *x.shape[1:]), x.dtype)
    return jax.tree.map(shape, rows)

  def rows(self, mesh: Mesh) -> loader.Rows:
    """The rows of a global batch that this process makes: those that its devices hold."""
    place = sharding.batch_shardings(0, mesh, self.config['sharding']['strategy'])
    return loader.rows_here(place, self.config['batch'])

  def place(self, batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global arrays of a batch, of which this process has its rows."""
    shardings = sharding.batch_shardings(batch, mesh, self.config['sharding']['strategy'])
    return loader.to_device(batch, self.config['batch'], shardings)

  def init_params(self, key: jax.Array, batch: dict[str, jax.Array]) -> Any:
    """Parameters boxed with their axis names; trace it with jax.jit or jax.eval_shape."""
    return self.model.init({'params': key}, batch, train=False)['params']

  @functools.cached_property
  def boxed_shapes(self) -> Any:
    """What init_params makes, in shapes only."""
    # The key is made inside: the mesh may be of devices that are not here.  And shapes have nothing
    # to do with it: what does not divide is still to be found.
    init = lambda batch: self.init_params(jax.random.key(0), batch)
    with nn.logical_axis_rules(()):
      return jax.eval_shape(init, self.abstract_batch())

  def abstract_params(self, mesh: Mesh) -> Any:
    """ShapeDtypeStructs of the parameters with their places on the mesh: a target to restore to."""
    boxed = self.boxed_shapes
    shardings = sharding.param_shardings(boxed, mesh, self.config['sharding']['strategy'])
    is_box = lambda x: isinstance(x, nn.Partitioned)
    shapes = jax.tree.map(lambda box: box.value, boxed, is_leaf=is_box)
    return sharding.placed(shapes, shardings)

  @functools.cached_property
  def flops(self) -> Flops:
    """Counted on the traced forward pass, so it is exact for any core; and what a mask hides."""
    # Kernels do not say what they compute, and a program on shards is only one device's.
    model = self.objective.model(self.core.clone(attention='reference'), self.vocab_size)
    init = lambda batch: model.init({'params': jax.random.key(0)}, batch, train=False)
    apply = lambda variables, batch: model.apply(variables, batch, train=False)
    batch, c = self.abstract_batch(), self.config
    with nn.logical_axis_rules(()):
      variables = nn.unbox(jax.eval_shape(init, batch))
      forward = metrics.matmul_flops(apply, variables, batch)
    every, seen = self.core.attention_flops(c['batch'], c['length'], self.objective.causal)
    return Flops(3 * (forward - every), seen, every)  # backward is twice forward


def prepare(config: Mapping[str, Any]) -> Experiment:
  """Opens every source and builds the core, touching no device.  `config` is resolved.

  Raises:
    UserError: whatever does not exist or does not fit together.
  """
  data = config['data']
  made = _parts(config)
  for name, of in (('train', 'the training source'), ('yardstick', 'evaluate.yardstick')):
    if name in data['eval']:
      raise UserError(f'data.eval: "{name}" is the name of {of}; choose another')
  opened = _open(config, {'train': data['train'], **data['eval']})
  read = set().union(*(source.reads for source in opened.values()))
  for key, kind in (('document', 'plain text'), ('text_key', 'JSONL, Parquet or TFDS')):
    if key not in read and data[key] != base().data[key]:
      raise UserError(f'data.{key} = "{data[key]}" is read by nothing: no source is {kind}')
  return Experiment(config, *made, opened)


def _open(config: Mapping[str, Any], specs: Mapping[str, str]) -> dict[str, sources.Source]:
  data = config['data']
  options = dict(document=data['document'], text_key=data['text_key'], cache=config['cache'])
  for name, spec in specs.items():
    if not isinstance(spec, str):
      raise UserError(f'the source of "{name}" is {spec!r}, not a name or path')
  return {name: sources.open_source(spec, **options) for name, spec in specs.items()}


class Sketch(Experiment):
  """An experiment without data: its shapes and programs are those of the real one."""

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    return tokenizer.get('bytes', ())

  @property
  def vocab_size(self) -> int:
    """That which the config asks for."""
    return self.config['tokenizer'].get('vocab_size') or self.tokenizer.vocab_size


def sketch(config: Mapping[str, Any], kind: type[Sketch] = Sketch) -> Sketch:
  """The resolved config's parts without its data, to compile what it would run."""
  return kind(config, *_parts(config), sources={})


def _parts(config: Mapping[str, Any]) -> tuple[Any, nn.Module, Optimizer]:
  """Objective, core and optimizer, each of which checks its own knobs."""
  core = dict(config['model'])
  core['max_length'] = core['max_length'] or config['length']
  if core['max_length'] < config['length']:
    raise UserError(f'length = {config["length"]} exceeds model.max_length = {core["max_length"]}')
  optimizer = Optimizer(**config['optimizer'])
  optimizer.schedule_fn(config['steps'])  # refuses a warm-up longer than the run
  sharding.rules(config['sharding']['strategy'])
  guard.check(config)
  canonical.check(config)
  return objectives.get(**config['objective']), models.get(**core), optimizer


def keep_programs(config: Mapping[str, Any], of: epath.Path | None = None) -> None:
  """Compiled programs are kept in the cache, small ones too: a second start compiles nothing.

  They are run as they are.  So where a run that may be anybody's names the cache (`of` is its
  directory), there are none from inside it, nor from what others can write to.
  """
  directory = epath.Path(config['cache']).expanduser() / 'xla'
  if '://' not in str(directory):
    os.makedirs(directory, mode=0o700, exist_ok=True)
    about, place = os.stat(directory), pathlib.Path(os.path.realpath(directory))
    reasons = {
      'it belongs to another user': about.st_uid != os.getuid(),
      f'others can write to it (chmod go-w {directory})': about.st_mode & 0o022,
      'it lies in the directory of the run': of and place.is_relative_to(os.path.realpath(of)),
    }
    if why := next((why for why, true in reasons.items() if true), ''):
      print(f'no compiled programs are kept in {directory}: {why}', flush=True)
      return
  jax.config.update('jax_compilation_cache_dir', str(directory))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


def run_path(workdir: str | os.PathLike) -> epath.Path:
  """The directory of a run, absolute, as Orbax wants it, or in a bucket."""
  workdir = os.fspath(workdir)
  local = '://' not in workdir
  path = epath.Path(os.path.abspath(os.path.expanduser(workdir)) if local else workdir)
  try:
    path.exists()
  except ImportError as e:  # epath reads gs:// with gcsfs and s3:// with s3fs
    raise UserError(f'{workdir}: {e}') from e
  return path


def open_run(workdir: str | os.PathLike, evaluation: bool = False) -> Experiment:
  """The experiment of an existing run, without data or with its evaluation sets.

  Raises:
    UserError: there is no run in `workdir`.
  """
  path = run_path(workdir)
  if not (path / 'config.json').exists():
    raise UserError(f'there is no run in {workdir}: it has no config.json')
  config = resolve(jsonio.read(path / 'config.json'))
  return saved(config, path, config['data']['eval'] if evaluation else {})


def saved(
  config: Mapping[str, Any], path: epath.Path, sets: Mapping[str, str] | None = None
) -> Experiment:
  """That of a run whose tokenizer lies in its directory, without data but these sets."""
  # What trained it need not be there where it is used.
  model = {key: 'auto' if key == 'attention' else x for key, x in config['model'].items()}
  parts, opened = _parts({**config, 'model': model}), _open(config, sets or {})
  return Experiment(config, *parts, opened, str(path / 'tokenizer'))
