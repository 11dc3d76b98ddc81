"""A configuration made into its parts.  Everything here happens before any device work."""

import dataclasses
import functools
import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from lmjax import models, objectives, sharding
from lmjax.config import UserError
from lmjax.data import loader, sources, store, tokenizer
from lmjax.data.pieces import Tokenizer
from lmjax.optimizer import Optimizer


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
      made = _trained_tokenizer(self.config, self.sources['train'])
    self.objective.check(made, self.config['length'], self.core)
    return made

  @functools.cached_property
  def model(self) -> nn.Module:
    """From a batch to loss terms and metrics."""
    return self.objective.model(self.core, self.tokenizer.vocab_size)

  @functools.cached_property
  def stores(self) -> dict[str, store.Store]:
    """The token store of each source, built if it is not there yet."""
    built = {
      k: store.build(s, self.tokenizer, self.config['cache']) for k, s in self.sources.items()
    }
    for name, tokens in built.items():
      if len(tokens) - 1 < self.config['length'] and name == 'train':
        raise UserError(
          f'{self.sources[name].spec} holds {len(tokens)} tokens: less than one window of '
          f'length = {self.config["length"]}'
        )
    return built

  @functools.cache  # noqa: B019, an experiment lives as long as the run
  def examples(self, name: str) -> Any:
    """The objective's rows of the training source ('train') or of an evaluation set."""
    c, train = self.config, name == 'train'
    return self.objective.examples(self.stores[name], self.tokenizer, c['length'], c['seed'], train)

  def abstract_batch(self, name: str = 'train') -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global batch, in which example 0 stands for all."""
    rows = self.examples(name)(np.zeros(1, np.int64), np.zeros(1, np.int64))
    shape = lambda x: jax.ShapeDtypeStruct((self.config['batch'], *x.shape[1:]), x.dtype)
    return jax.tree.map(shape, rows)

  def place(self, batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global arrays of a batch, of which this process has its rows."""
    strategy = self.config['sharding']['strategy']
    return loader.to_device(batch, sharding.batch_shardings(batch, mesh, strategy))

  def init_params(self, key: jax.Array, batch: dict[str, jax.Array]) -> Any:
    """Parameters boxed with their axis names; trace it with jax.jit or jax.eval_shape."""
    return self.model.init({'params': key}, batch, train=False)['params']

  def boxed_shapes(self, name: str = 'train') -> Any:
    """What init_params makes of a batch of the named set, in shapes only."""
    return jax.eval_shape(self.init_params, jax.random.key(0), self.abstract_batch(name))

  def abstract_params(self, mesh: Mesh, name: str = 'train') -> Any:
    """ShapeDtypeStructs of the parameters with their places on the mesh: a target to restore to."""
    boxed = self.boxed_shapes(name)
    shardings = sharding.param_shardings(boxed, mesh, self.config['sharding']['strategy'])
    struct = lambda box, place: jax.ShapeDtypeStruct(
      box.value.shape, box.value.dtype, sharding=place
    )
    return jax.tree.map(struct, boxed, shardings, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def prepare(config: Mapping[str, Any], saved_tokenizer: str = '', train: bool = True) -> Experiment:
  """Opens every source and builds the core, touching no device.

  Args:
    config: resolved.
    saved_tokenizer: a directory to load the tokenizer from; else it is trained, or found trained.
    train: whether the training source is opened as well.

  Raises:
    UserError: whatever does not exist or does not fit together.
  """
  data = config['data']
  objective, core, optimizer = _parts(config)
  if 'train' in data['eval']:
    raise UserError('data.eval: "train" is the name of the training source; choose another')
  names = ({'train': data['train']} if train else {}) | data['eval']
  options = dict(document=data['document'], text_key=data['text_key'], cache=config['cache'])
  opened = {name: sources.open_source(spec, **options) for name, spec in names.items()}
  return Experiment(config, objective, core, optimizer, opened, saved_tokenizer)


class Sketch(Experiment):
  """An experiment on two short documents: its shapes and programs are those of the real one."""

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    return tokenizer.get('bytes', ())

  @functools.cached_property
  def model(self) -> nn.Module:
    """With a vocabulary of the size that the config asks for."""
    vocab_size = self.config['tokenizer'].get('vocab_size') or self.tokenizer.vocab_size
    return self.objective.model(self.core, vocab_size)

  @functools.cached_property
  def stores(self) -> dict[str, store.Store]:
    text = 'A sketch stands for the corpus. Its rows have the shapes of all rows. ' * 3
    documents = store.from_documents([text, text], self.tokenizer)
    return dict.fromkeys(['train', *self.config['data']['eval']], documents)


def sketch(config: Mapping[str, Any]) -> Sketch:
  """The resolved config's parts without its data, to compile what it would run."""
  return Sketch(config, *_parts(config), sources={})


def _parts(config: Mapping[str, Any]) -> tuple[Any, nn.Module, Optimizer]:
  """Objective, core and optimizer, each of which checks its own knobs."""
  core = dict(config['model'])
  core['max_length'] = core['max_length'] or config['length']
  if core['max_length'] < config['length']:
    raise UserError(f'length = {config["length"]} exceeds model.max_length = {core["max_length"]}')
  optimizer = Optimizer(**config['optimizer'])
  optimizer.schedule_fn(config['steps'])  # refuses a warm-up longer than the run
  sharding.rules(config['sharding']['strategy'])
  return objectives.get(**config['objective']), models.get(**core), optimizer


def open_run(workdir: str) -> Experiment:
  """The experiment of an existing run, with its evaluation sets only.

  Raises:
    UserError: there is no run in `workdir`.
  """
  path = epath.Path(workdir)
  if not (path / 'config.json').exists():
    raise UserError(f'there is no run in {workdir}: it has no config.json')
  saved = json.loads((path / 'config.json').read_text())
  return prepare(saved, saved_tokenizer=str(path / 'tokenizer'), train=False)


def _trained_tokenizer(config: Mapping[str, Any], source: Any) -> Any:
  """The tokenizer of the config, kept in the cache by what it was made of."""
  options = dict(config['tokenizer'])
  texts = lambda: (source[i] for i in range(len(source)))
  if options.get('path'):
    return tokenizer.get(texts=texts, **options)
  key = json.dumps([options, source.fingerprint], sort_keys=True)
  digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
  directory = epath.Path(config['cache']).expanduser() / 'tokenizers' / digest
  if directory.exists():
    return tokenizer.load(str(directory))
  made = tokenizer.get(texts=texts, **options)
  scratch = epath.Path(f'{directory}.{uuid.uuid4().hex[:8]}.tmp')
  scratch.mkdir(parents=True)
  made.save(str(scratch))
  try:
    scratch.rename(directory)
  except OSError:  # another run made it at the same time
    scratch.rmtree()
  return made
