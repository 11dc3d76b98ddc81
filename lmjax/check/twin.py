"""The small twin of an experiment: narrow, shallow, on little text, and else the same."""

import contextlib
import copy
import functools
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from lmjax import config as config_lib
from lmjax import experiment, sharding
from lmjax.data import loader, tokenizer
from lmjax.data.pieces import Tokenizer
from lmjax.data.store import Store

Batch = dict[str, np.ndarray]
ROWS, LENGTH = 8, 64
# Of ids, where a kind is trained: its alphabet and some words.
VOCABULARY = {'sentencepiece': 320, 'wordpiece': 128}
# On a CPU these halve the time of the oracles, most of which is compiling what runs once.
QUICKLY = {
  'xla_cpu_use_fusion_emitters': False,
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
SPREAD = 0.3  # above 1 / sqrt(fan-in): with the usual 0.02 a wrong part hardly moves a loss


class Finding(NamedTuple):
  """What an oracle saw; `holds` is None where the experiment asks for nothing of the kind."""

  holds: bool | None
  saw: str
  meaning: str = ''  # of a failure: what it means, and where to look


class Twin(experiment.Sketch):
  """An experiment on one device, in float32, with parameters and a batch to try things on."""

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    options = dict(self.config['tokenizer'])
    return tokenizer.get(options.pop('name'), [' '.join(part) for part in _documents()], **options)

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  @functools.cached_property
  def stores(self) -> dict[str, Store]:
    t, tokens, documents, sentences = self.tokenizer, [], [0], []
    for document in _documents():
      for sentence in document:
        sentences.append(len(tokens))
        tokens += t.encode(sentence + ' ')
      tokens.append(t.eos)
      documents.append(len(tokens))
    text = '\n'.join(itertools.chain.from_iterable(_documents()))
    arrays = np.array(tokens, np.int32), np.array(documents), np.array(sentences)
    return dict.fromkeys(('train', 'twin'), Store([arrays[0]], *arrays[1:], len(text), 'twin'))

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    return sharding.make_mesh(None, devices()[:1])

  def here(self) -> contextlib.AbstractContextManager[None]:
    return there(self.mesh, self.config['sharding']['strategy'])

  @functools.cached_property
  def batch(self) -> Batch:
    return loader.Loader(self.examples('train'), ROWS, self.config['seed']).batch(0)

  @functools.cached_property
  def params(self) -> Any:
    """Those that a run would begin with, on the host."""
    make = lambda key: nn.unbox(self.init_params(key, self.batch))
    init = jax.jit(make, compiler_options=quickly())
    with self.here():
      return jax.device_get(init(jax.random.key(self.config['seed'])))

  @functools.cached_property
  def wide(self) -> Any:
    """Those and more noise, so that everything moves the loss, also what begins with zeros."""
    noise = np.random.default_rng(0)
    more = lambda x: (x + SPREAD * noise.standard_normal(x.shape)).astype(x.dtype)
    return jax.tree.map(more, self.params)

  @functools.cached_property
  def _totals(self) -> Any:
    apply = lambda params, batch, key: self.model.apply(
      {'params': params}, batch, train=False, rngs={'dropout': key}
    )
    return jax.jit(apply, compiler_options=quickly())

  def totals(self, params: Any, batch: Batch, key: int = 0) -> tuple[dict[str, Any], ...]:
    """(loss terms, metrics) of an evaluation; the key is for noise that there should not be."""
    with self.here():
      return jax.device_get(self._totals(params, batch, jax.random.key(key)))

  def loss(self, batch: Batch) -> float:
    """The sum over all places that weigh something, with the wide parameters."""
    return float(sum(float(term.total) for term in self.totals(self.wide, batch)[0].values()))

  def dropouts(self, train: bool) -> set[tuple[str, bool]]:
    """(path, whether it drops anything) of each nn.Dropout with a rate above 0 that is called."""
    found = set()

    def look(call, args, kwargs, context):
      result = call(*args, **kwargs)
      if isinstance(context.module, nn.Dropout) and context.module.rate > 0:
        handed_on = any(result is x for x in (*args, *kwargs.values()))
        found.add(('.'.join(context.module.path), not handed_on))
      return result

    apply = lambda params, batch, key: self.model.apply(
      {'params': params}, batch, train=train, rngs={'dropout': key}
    )
    of = self.params, self.batch  # made here, or what makes them would be looked at, too
    with self.here(), nn.intercept_methods(look):
      jax.eval_shape(apply, *of, jax.random.key(0))
    return found

  @functools.cached_property
  def slope(self) -> Any:
    """(parameters, batch) -> (loss, gradients): of the sum of the terms' means, in evaluation."""

    def loss(params, batch):
      terms, _ = self.model.apply({'params': params}, batch, train=False)
      return sum(term.total / term.weight for term in terms.values())

    compiled = jax.jit(jax.value_and_grad(loss), compiler_options=quickly())

    def call(params, batch):
      with self.here():
        return jax.device_get(compiled(params, batch))

    return call

  def but(self, **sections: Any) -> 'Twin':
    """This twin with other values in its config: but(steps=3, model={'dtype': 'bfloat16'})."""
    changed = copy.deepcopy(dict(self.config))
    for key, value in sections.items():
      changed[key] = {**changed[key], **value} if isinstance(value, Mapping) else value
    other = experiment.sketch(changed, Twin)
    shared = ('tokenizer', 'stores', 'batch', 'params', 'wide')
    vars(other).update({key: getattr(self, key) for key in shared})
    return other


def of(config: Mapping[str, Any]) -> Twin:
  """The twin of a resolved config; UserError where its parts do not fit together."""
  parts, c = experiment.sketch(config), copy.deepcopy(dict(config))
  c |= dict(batch=ROWS, length=LENGTH, micro_batches=1, virtual_shards=ROWS)
  c['model'] |= parts.core.small()
  for key in parts.objective.counts_tokens:
    if c['objective'][key]:
      share = c['objective'][key] / config['length']
      c['objective'][key] = max(8, math.ceil(share * LENGTH))
  c['sharding'] |= dict(replica=1, data=1, sequence=1, model=1)
  kind = c['tokenizer']['name']
  kind = 'sentencepiece' if kind == 'published' else kind
  known = config_lib.base(tokenizer=kind).tokenizer.to_dict()
  asked = {key: value for key, value in c['tokenizer'].items() if key in known}
  of_a_file = {'path': '', 'opening': False}
  asked |= {'name': kind} | {key: x for key, x in of_a_file.items() if key in known}
  c['tokenizer'] = known | asked
  if kind in VOCABULARY:
    c['tokenizer']['vocab_size'] = VOCABULARY[kind]
  made = experiment.sketch(c, Twin)
  made.objective.check(made.tokenizer, LENGTH, made.core)
  return made


@functools.cache
def quickly() -> dict[str, bool | int] | None:
  """Options of compilers; None of an XLA that does not know them, as its flags come and go."""
  try:
    with jax.default_device(devices()[0]):
      jax.jit(lambda x: x, compiler_options=QUICKLY).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None
  return QUICKLY


def devices() -> list[jax.Device]:
  """CPUs of this process, where JAX was told to use any."""
  try:
    return jax.local_devices(backend='cpu')
  except RuntimeError:  # JAX_PLATFORMS names accelerators only
    return jax.local_devices()


@contextlib.contextmanager
def there(mesh: jax.sharding.Mesh, strategy: str) -> Iterator[None]:
  """In it, programs are for the devices of a mesh, whatever else JAX would take, and are exact."""
  here, exact = jax.default_device(mesh.devices.flat[0]), jax.default_matmul_precision('highest')
  with here, exact, jax.set_mesh(mesh), sharding.logical_axes(strategy):
    yield


@functools.cache
def _documents() -> list[list[str]]:
  """48 documents of sentences of made-up words, the first of which are the most frequent."""
  chance = random.Random(0)
  syllable = lambda: chance.choice('bdfgklmnprst') + chance.choice('aeiou')
  words = [''.join(syllable() for _ in range(chance.randint(1, 3))) for _ in range(150)]
  uses = [1 / (1 + rank) for rank in range(len(words))]
  sentence = lambda: ' '.join(chance.choices(words, uses, k=chance.randint(3, 9))).capitalize()
  return [[sentence() + '.' for _ in range(chance.randint(3, 8))] for _ in range(48)]
