"""Weights of `transformers`, in and out, without torch: safetensors and JSON.

A file for each architecture says what its config means here, and what its arrays are called.
"""

import importlib
import os
import re
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from flax import traverse_util

from lmjax import config as config_lib
from lmjax import experiment, jsonio, sharding
from lmjax.checkpoint import Checkpoints
from lmjax.config import did_you_mean
from lmjax.data.pieces import SentencePiece, Tokenizer
from lmjax.errors import UserError
from lmjax.evaluate import restore_params
from lmjax.huggingface import tokens, weights
from lmjax.saving import FRESH
from lmjax.state import begin_with, init_state
from lmjax.terminal import say
from lmjax.workdir import EXPERIMENT, describe, owned

ARCHITECTURES = ('gpt2', 'llama', 'roberta', 'bert')
LONGEST = 1024  # tokens in an example of an imported experiment, at most
# It is run, and so no name of a file goes into it.
HEADER = '''"""An imported model; with its directory for DIR, its run goes on with

python -m lmjax.main --config DIR/experiment.py --workdir DIR
"""
'''


class Source(NamedTuple):
  """A directory that `transformers` could open."""

  directory: epath.Path
  architecture: Any  # the module of it
  settings: Mapping[str, Mapping[str, Any]]  # the sections `objective` and `model` of our config
  vocab_size: int
  files: weights.Files


def load(path: str | os.PathLike) -> tuple[nn.Module, Any, Tokenizer | None]:
  """(model, params, tokenizer) of a directory with config.json and safetensors.

  model.apply({'params': params}, tokens_BL, method='logits') gives the logits [B, L, V] in float32.
  An encoder's methods `encode`, `logits` and `pooled` also take segments_BL (0 is padding, which
  follows the text) and types_BL; a decoder's `encode` and `logits` take segments_BL and
  positions_BL.  `encode` gives the last vectors [B, L, D]; those of every block, and its attention
  weights, are seen in Flax's own way, with capture_intermediates (README.md).  The tokenizer is
  None where the directory has none.  What is missing or surplus is said.

  Raises:
    UserError: there is none, of an architecture not known here, or its arrays are others.
  """
  source = _open(path)
  parts = experiment.sketch(_resolved(source, 'published', {'vocab_size': source.vocab_size}, {}))
  params = _params(source, parts)
  return parts.model, params, tokens.find(source.directory, source.vocab_size)


def _open(path: str | os.PathLike) -> Source:
  directory = epath.Path(path).expanduser()
  if not (directory / 'config.json').exists():
    raise UserError(f'there is no model in {directory}: it has no config.json')
  about = jsonio.read(directory / 'config.json')
  kind = about.get('model_type')
  if kind not in ARCHITECTURES:
    known = did_you_mean(kind, ARCHITECTURES)
    raise UserError(f'{directory}: weights of type "{kind}" are not known here{known}')
  architecture = importlib.import_module(f'lmjax.huggingface.{kind}')
  other = '; convert a pytorch_model.bin with safetensors first, as it may run code'
  files = weights.Files(directory, architecture.PREFIX, other)
  vocab_size = about.get('vocab_size')
  if not isinstance(vocab_size, int) or vocab_size < 1:
    raise UserError(f'{directory}/config.json: vocab_size = {vocab_size}')
  asked = weights.Asked(about)
  weights.refuse(
    asked, {'is_encoder_decoder': False, 'quantization_config': None, 'sliding_window': None}
  )
  try:
    settings = architecture.settings(asked, files.__contains__)
  except UserError:
    raise
  except (TypeError, ValueError, ArithmeticError) as e:
    raise UserError(f'{directory}/config.json: a value is of the wrong kind ({e})') from e
  if odd := asked.unread():
    say(f'{directory}/config.json also says {_some(odd)}, which is not read here')
  return Source(directory, architecture, settings, vocab_size, files)


def _resolved(
  source: Source, kind: str, tokenizer: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
  """The experiment that this model is of."""
  objective, model = (dict(source.settings[name]) for name in ('objective', 'model'))
  c = config_lib.base(objective.pop('name'), tokenizer=kind)
  c.tokenizer.update(tokenizer)
  try:
    c.objective.update(objective)
    c.model.update(model)
    c.length = min(model['max_length'], LONGEST)
    with c.unlocked():
      c.update_from_flattened_dict(overrides)
  except (TypeError, ValueError) as e:
    raise UserError(f'{source.directory}/config.json: {e}') from e
  sizes = {**model, 'vocab_size': source.vocab_size}
  if wide := [f'{key} = {x}' for key, x in sizes.items() if isinstance(x, int) and x >> 24]:
    raise UserError(f'{source.directory}/config.json is of no model that there is: {wide[0]}')
  if model['depth'] > len(source.files.names()):
    raise UserError(f'{source.directory} has no weights of {model["depth"]} layers')
  return config_lib.resolve(c)


def _params(source: Source, parts: experiment.Experiment) -> Any:
  """Float32 arrays on the default device."""
  shapes = traverse_util.flatten_dict(nn.unbox(parts.boxed_shapes), sep='/')
  architecture, files = source.architecture, source.files
  table = architecture.weights(source.settings['objective'], source.settings['model'])
  adjust = lambda name, x: architecture.adjust(name, x, files.read)
  found, missing, surplus = weights.taken(
    table, {path: x.shape for path, x in shapes.items()}, files, adjust
  )
  lacking = shapes.keys() - found.keys()
  if needed := [path for path in sorted(lacking) if not path.startswith(architecture.OPTIONAL)]:
    raise UserError(f'{source.directory} has no {_some(missing)}, of which {needed[0]} is made')
  if lacking:
    say(f'{source.directory} has no {_some(missing)}: what is made of them begins at random')
    found |= _random(parts, lacking)
  if odd := [name for name in surplus if not re.fullmatch(architecture.SURPLUS, name)]:
    say(f'{source.directory} also has {_some(odd)}, which is not used')
  arrays = {path: jnp.asarray(x, jnp.float32) for path, x in found.items()}
  return traverse_util.unflatten_dict(arrays, sep='/')


def _random(parts: experiment.Experiment, paths: set[str]) -> dict[str, jax.Array]:
  batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parts.abstract_batch())

  def some(key, batch):
    made = traverse_util.flatten_dict(nn.unbox(parts.init_params(key, batch)), sep='/')
    return {path: made[path] for path in paths}

  with nn.logical_axis_rules(()):
    return jax.jit(some)(jax.random.key(parts.config['seed']), batch)


def _some(names: list[str]) -> str:
  return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if names[4:] else '')


# -------------------------------------------------------------------------- to and from workdirs


def to_workdir(
  path: str | os.PathLike,
  workdir: str | os.PathLike,
  overrides: Mapping[str, Any] | None = None,
) -> None:
  """Makes a workdir, at step 0 of a run that begins with these weights.

  `overrides` are of its config, such as {'data.train': 'corpus.txt'}.

  Raises:
    UserError: as `load`; there is no tokenizer; the workdir is not empty.
  """
  source, place = _open(path), experiment.run_path(workdir)
  if place.exists() and any(place.iterdir()):
    raise UserError(f'{place} is not empty: choose another workdir')
  made = tokens.find(source.directory, source.vocab_size)
  if made is None:
    raise UserError(
      f'there is no tokenizer in {source.directory}: copy there the one that these weights were '
      f'trained with, as {" or ".join(tokens.FILES)}'
    )
  where = {'path': str(place / 'tokenizer' / 'tokenizer.model'), 'vocab_size': source.vocab_size}
  where['opening'] = bool(made.opening)
  c = _resolved(source, made.name, where, overrides or {})
  sketch = experiment.sketch(c)
  params = _params(source, sketch)
  place.mkdir(parents=True, exist_ok=True)
  with owned(place):
    made.save(place / 'tokenizer')
    parts = experiment.saved(c, place)
    mesh = sharding.mesh_of_run(c, parts.boxed_shapes)
    with jax.set_mesh(mesh), sharding.logical_axes(c['sharding']['strategy']):
      like, transform, _ = init_state(parts, mesh)
      state = begin_with(params, like, c['seed'], transform)
    digests = {'tokenizer': made.fingerprint}
    with Checkpoints(place / 'checkpoints') as checkpoints:
      checkpoints.save(0, state, {**FRESH, 'roll_backs': 0, 'config': c, 'data': digests})
    (place / 'experiment.py').write_text(HEADER + EXPERIMENT)
    describe(parts, place, digests, state.params, 0)


def from_workdir(
  workdir: str | os.PathLike, path: str | os.PathLike, step: int | None = None
) -> None:
  """Writes a checkpoint, by default the newest, as a directory that `transformers` opens.

  Raises:
    UserError: the model is none that `transformers` has, or the directory is not empty.
  """
  parts, directory = experiment.open_run(workdir), epath.Path(path).expanduser()
  if directory.exists() and any(directory.iterdir()):
    raise UserError(f'{directory} is not empty: choose another')
  objective, model = parts.config['objective'], _filled(parts)
  given = {'objective': objective, 'model': model, 'tokenizer': {'pad': parts.tokenizer.pad}}
  architecture = _architecture(given)
  mesh = sharding.mesh_of_run(parts.config, parts.boxed_shapes)
  with jax.set_mesh(mesh), sharding.logical_axes(parts.config['sharding']['strategy']):
    _, params = restore_params(parts, str(workdir), mesh, step)
  flat = traverse_util.flatten_dict(jax.device_get(params), sep='/')
  flat = {name: np.asarray(_cut(name, x, parts.vocab_size)) for name, x in flat.items()}
  arrays = architecture.complete(weights.given(architecture.weights(objective, model), flat))
  full = lambda name: name if name.startswith(architecture.HEADS) else architecture.PREFIX + name
  t = parts.tokenizer
  about = {**architecture.published(objective, model), 'vocab_size': parts.vocab_size}
  ids = {'bos': t.bos, 'eos': t.eos, 'pad': t.pad}
  about |= {f'{role}_token_id': i for role, i in ids.items() if f'{role}_token_id' not in about}
  scratch = epath.Path(f'{directory}.{uuid.uuid4().hex[:8]}.tmp')
  scratch.mkdir(parents=True)
  weights.write(scratch, {full(name): x for name, x in arrays.items()})
  if not tokens.write(t, scratch, types=about.get('type_vocab_size', 0) > 1):
    after = 'and `import` needs one'
    if isinstance(t, SentencePiece):
      after = f'copy {parts.saved_tokenizer}/tokenizer.model to {directory} before you `import` it'
    say(f'`transformers` has no tokenizer like "{t.name}": none is written; {after}')
  jsonio.write(scratch / 'config.json', {**about, 'dtype': 'float32'})
  scratch.rename(directory)


def _filled(parts: experiment.Experiment) -> dict[str, Any]:
  """The section `model` with what its size and its defaults stand for."""
  core = parts.core
  known = {key: getattr(core, key) for key in parts.config['model'] if hasattr(core, key)}
  known |= {'kv_heads': core.kv_heads or core.heads, 'ffn_dim': core.ffn_dim or 4 * core.dim}
  return known


def _architecture(given: Mapping[str, Mapping[str, Any]]) -> Any:
  """The first whose models this is one of."""
  why = []
  for name in ARCHITECTURES:
    found = importlib.import_module(f'lmjax.huggingface.{name}')
    wrong = [
      f'{section}.{key} = {given[section].get(key)!r}'
      for section, wanted in found.KNOWN.items()
      for key, value in wanted.items()
      if given[section].get(key) != value
    ]
    if not wrong:
      return found
    why.append(f'{name} has no {", ".join(wrong[:3])}')
  raise UserError(f'no architecture known here is this model: {"; ".join(why)}')


def _cut(name: str, x: np.ndarray, vocab_size: int) -> np.ndarray:
  """Without the rows that only make a table divide."""
  return x[:vocab_size] if name in ('embed/table', 'head/table/table', 'head/bias') else x
