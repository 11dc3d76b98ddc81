"""Arrays in safetensors files, and where each of our parameters is found among them.

Ours are stacked over layers and keep the dimensions of heads apart; theirs are matrices, one name a
layer, transposed where PyTorch's Linear holds them.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from lmjax import jsonio
from lmjax.errors import StorageError, UserError

INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
_NUMBERS = ('float32', 'float16', 'bfloat16', 'float64')
IDLE = frozenset(  # keys of a published config that change no number here
  """
  _name_or_path architectures bos_token_id chunk_size_feed_forward classifier_dropout
  directionality dtype eos_token_id finetuning_task gradient_checkpointing id2label
  initializer_range label2id model_type n_ctx output_attentions output_hidden_states output_past
  pad_token_id pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
  pooler_type pretraining_tp problem_type return_dict summary_activation summary_first_dropout
  summary_proj_to_labels summary_type summary_use_proj task_specific_params torch_dtype
  transformers_version use_cache vocab_size
  """.split()
)


@dataclasses.dataclass(frozen=True)
class Weight:
  """Where a parameter is.

  ours: its path.
  theirs: its name; with {}, there is one for each layer, and ours has them along its first axis.
  transposed: theirs is [outputs, inputs].
  part: (i, n): ours is the i-th of n equal parts of theirs, along the outputs.
  skip: so many rows at the beginning of theirs are none of ours.
  other: what it is called where the name is not there.
  """

  ours: str
  theirs: str
  transposed: bool = False
  part: tuple[int, int] = (0, 1)
  skip: int = 0
  other: str = ''

  def name(self, layer: int) -> str:
    return self.theirs.format(layer)

  @property
  def layered(self) -> bool:
    return '{}' in self.theirs


def modules(
  names: Mapping[str, str], weight: str = 'kernel', transposed: bool = False
) -> list[Weight]:
  """Of modules, ours -> theirs: the weight, by its name here, and the bias."""
  found = []
  for ours, theirs in names.items():
    found.append(Weight(f'{ours}/{weight}', f'{theirs}.weight', transposed))
    found.append(Weight(f'{ours}/bias', f'{theirs}.bias'))
  return found


class Files:
  """The arrays of a directory with safetensors, read one by one.  UserError where it has none."""

  def __init__(self, directory: epath.Path, prefix: str, other: str):
    """Names lose `prefix`, which some classes give to all; `other` is what such files may be."""
    self._directory, self._places, self._opened = directory, {}, {}
    if (directory / INDEX).exists():
      places = jsonio.read(directory / INDEX).get('weight_map')
      if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise UserError(f'{directory / INDEX} has no weight_map')
    elif (directory / SINGLE).exists():
      places = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
    else:
      raise UserError(f'{directory} has no {SINGLE} and no {INDEX}{other}')
    for name, file in places.items():
      if os.path.basename(file) != file or not file.endswith('.safetensors'):
        raise UserError(f'{directory / INDEX}: "{file}" is no file beside it')
      self._places[name.removeprefix(prefix)] = name, file

  def __contains__(self, name: str) -> bool:
    return name in self._places

  def names(self) -> list[str]:
    return sorted(self._places)

  def read(self, name: str) -> np.ndarray:
    """In float32."""
    import safetensors

    full, file = self._places[name]
    try:
      array = self._open(file).get_tensor(full)
    except safetensors.SafetensorError as e:
      raise UserError(f'{self._directory / file}: {full} cannot be read: {e}') from e
    if array.dtype.name not in _NUMBERS:
      raise UserError(f'{self._directory / file}: {full} is of type {array.dtype.name}')
    return array.astype(np.float32)

  def _open(self, file: str) -> Any:
    import ml_dtypes  # noqa: F401, by which NumPy knows bfloat16
    import safetensors

    try:
      if file not in self._opened:
        self._opened[file] = safetensors.safe_open(self._directory / file, framework='np')
      return self._opened[file]
    except (OSError, safetensors.SafetensorError) as e:
      raise UserError(f'{self._directory / file} cannot be read: {e}') from e


def taken(
  weights: Iterable[Weight],
  shapes: Mapping[str, tuple[int, ...]],
  files: Files,
  adjust: Callable[[str, np.ndarray], np.ndarray],
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
  """(our path -> array, of those that are there; what of ours is not; what nobody has asked for).

  `adjust` is what else is to be done with an array of theirs.

  Raises:
    UserError: an array has not the shape that ours needs.
  """
  found, missing, read = {}, [], set()
  by_path = {weight.ours: weight for weight in weights}
  for path, shape in shapes.items():
    weight = by_path[path]
    layers = range(shape[0]) if weight.layered else range(1)
    names = [weight.name(layer) for layer in layers]
    if weight.other in files and names[0] not in files:
      names = [weight.other]
    lacking = [name for name in names if name not in files]
    read |= set(names) - set(lacking)
    if lacking:
      missing += lacking
      continue
    of_one = shape[1:] if weight.layered else shape
    arrays = [_ours(weight, n, adjust(n, files.read(n)), of_one) for n in names]
    found[path] = np.stack(arrays) if weight.layered else arrays[0]
  return found, missing, [name for name in files.names() if name not in read]


def _ours(weight: Weight, name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  there = x.shape
  x = x[weight.skip :]
  if weight.transposed and x.ndim == 2:
    x = x.T
  i, n = weight.part
  if x.ndim and x.shape[-1] % n == 0:
    x = np.split(x, n, axis=-1)[i]
  flat = [tuple(map(math.prod, (shape[:i], shape[i:]))) for i in range(1, len(shape))]
  if x.shape not in (shape, (math.prod(shape),), *flat):
    what = 'x'.join(map(str, shape))
    raise UserError(f'{name} is {"x".join(map(str, there))}, and {weight.ours} is to be {what}')
  return x.reshape(shape)


def given(weights: Iterable[Weight], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Their name -> array, of our parameters by path."""
  made = {}
  known = [weight for weight in weights if weight.ours in params]
  of_name = lambda weight: weight.theirs
  for _, group in itertools.groupby(sorted(known, key=of_name), key=of_name):
    parts = sorted(group, key=lambda weight: weight.part)
    first = parts[0]
    assert len(parts) == first.part[1], first
    for layer in range(len(params[first.ours]) if first.layered else 1):
      arrays = [_theirs(w, params[w.ours][layer] if w.layered else params[w.ours]) for w in parts]
      x = np.concatenate(arrays, axis=-1)
      x = x.T if first.transposed and x.ndim == 2 else x
      made[first.name(layer)] = np.ascontiguousarray(x)
  return made


def _theirs(weight: Weight, x: np.ndarray) -> np.ndarray:
  name = weight.ours.rpartition('/')[2]
  if name == 'kernel':
    joined = '/out/' in weight.ours  # from heads and their dims; elsewhere there is one input
    x = x.reshape(-1, x.shape[-1]) if joined else x.reshape(len(x), -1)
  elif name == 'bias':
    x = x.reshape(-1)
  if weight.skip:
    x = np.concatenate([np.zeros((weight.skip, *x.shape[1:]), x.dtype), x])
  return x


def write(directory: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes one file of safetensors."""
  import safetensors.numpy

  try:
    (directory / SINGLE).touch()
    mode = os.stat(directory / SINGLE).st_mode
    safetensors.numpy.save_file(dict(arrays), directory / SINGLE, metadata={'format': 'pt'})
    os.chmod(directory / SINGLE, mode)  # theirs is for its owner alone
  except (OSError, safetensors.SafetensorError) as e:
    raise StorageError(f'{directory / SINGLE} cannot be written: {e}') from e


class Asked(Mapping[str, Any]):
  """A published config, and which of its keys somebody has asked for: `asked`."""

  def __init__(self, config: Mapping[str, Any]):
    self._config, self.asked = config, set()

  def __getitem__(self, key: str) -> Any:
    self.asked.add(key)
    return self._config[key]

  def __iter__(self) -> Iterator[str]:
    return iter(self._config)

  def __len__(self) -> int:
    return len(self._config)

  def unread(self) -> list[str]:
    """Keys that say something, which nobody has asked for and which are not idle."""
    return sorted(key for key in self._config.keys() - self.asked - IDLE if self._config[key])


def activation(key: str, name: str, known: Mapping[str, str]) -> str:
  if name not in known:
    raise UserError(f'{key} = "{name}" is none of {", ".join(known)}')
  return known[name]


def refuse(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  """Raises a UserError where a published config asks for what ours cannot do."""
  for key, value in wanted.items():
    if config.get(key, value) != value:
      asked = json.dumps(config[key])[:80]
      raise UserError(f'config.json: {key} = {asked}, and only {json.dumps(value)} is known here')
