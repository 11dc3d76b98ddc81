"""An experiment is a ConfigDict: every knob once, typed; overrides; sweeps as lists of overrides.

`base()` holds the knobs of the run itself.  The knobs of an objective, a model, a tokenizer and the
optimizer are the keyword arguments of the thing itself: `base()` reads their names, types and
defaults from its source text without importing it, so that loading an experiment or expanding a
sweep imports no JAX and touches no device.
"""

import contextlib
import difflib
import functools
import importlib.util
import inspect
import math
import os
import pathlib
import re
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from lmjax import schema
from lmjax.errors import UserError
from lmjax.sweep import Overrides, arguments, chain, flags_of, product, zipped

# What experiments make their sweeps with, and what an element is on a command line.
__all__ = ['arguments', 'chain', 'flags_of', 'product', 'zipped']

OPEN = ('data.eval', 'optimizer.args')  # sections whose keys are the user's own
LEAST = dict.fromkeys(('seed', 'checkpoint.keep_every'), 0)
LEAST |= dict.fromkeys(('evaluate.batches', 'evaluate.yardstick'), 0)
LEAST |= dict.fromkeys(('guard.limit', 'guard.replicas', 'checkpoint.minutes'), 0)
LEAST |= dict.fromkeys(('steps', 'batch', 'micro_batches', 'length', 'checkpoint.every'), 1)
LEAST |= dict.fromkeys(('checkpoint.keep_last', 'evaluate.every', 'log.every', 'virtual_shards'), 1)
_SAID = {  # of a value, by the parsers of flags -> by us
  'invalid literal for int': 'is no whole number',
  'could not convert string to float': 'is no number',
  r"\('Non-boolean": 'is neither True nor False',
  'Failed to parse .* as a ConfigDict': 'is no dict: give it as {"name": …}',
}


def did_you_mean(name: str, options: Iterable[str]) -> str:
  """' (did you mean "rate"?)' for the nearest of `options`; all of them when none is near."""
  options = sorted(map(str, options))
  near = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
  return f' (did you mean "{near[0]}"?)' if near else f' (known: {", ".join(options) or "none"})'


def base(
  objective: str = 'clm', model: str = 'transformer', tokenizer: str = 'sentencepiece'
) -> ConfigDict:
  """The whole configuration with its defaults, for the named objective, model and tokenizer."""
  c = ConfigDict()
  c.seed = 0  # parameters, data order, masks and dropout all follow from it
  c.steps = 1000  # optimizer updates in the run
  c.batch = 32  # examples in a global batch
  c.micro_batches = 1  # parts in which a batch is computed, one after the other
  c.deterministic_sum = False  # the same bits on any power of two of devices (at least 2)
  c.virtual_shards = 8  # parts of a batch that it adds up; no fewer than devices
  c.length = 256  # tokens in an example
  c.check = True  # before a new run the oracles of lmjax.check are tried on a small twin of it
  c.init_from = ''  # a workdir whose parameters start this run, instead of random ones
  c.cache = '~/.cache/lmjax'  # where corpora, tokenizers, token stores and compiled programs lie

  c.data = ConfigDict()
  c.data.train = 'python'  # a source: python, tfds:NAME#SPLIT or files; see lmjax/data/sources.py
  c.data.eval = {'validation': 'python#validation'}  # name -> source
  c.data.document = 'file'  # what a document is in plain text: file, line or paragraph
  c.data.text_key = 'text'  # the field that holds the text in JSONL, Parquet and TFDS records

  c.tokenizer = _section('tokenizer', tokenizer)
  c.objective = _section('objective', objective)
  c.model = _section('model', model)
  c.model.size = ''  # a name in models/transformer.py SIZES; explicit depth, dim and heads win
  c.optimizer = _section('optimizer', 'adamw')

  c.sharding = ConfigDict()
  c.sharding.strategy = 'replicate'  # a row of sharding.RULES
  c.sharding.replica = config_dict.placeholder(int)  # sizes of the mesh's axes; None: the slices
  c.sharding.data = -1  # one may be -1, for all that the others leave
  c.sharding.sequence = c.sharding.model = 1
  c.sharding.max_unsharded = 0.1  # a larger share of parameters whole on every device is an error

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 500  # steps between checkpoints; the last step is always saved
  c.checkpoint.minutes = 0.0  # and minutes, looked at every log.every steps; 0: only by steps
  c.checkpoint.keep_last = 2  # the newest so many are kept
  c.checkpoint.keep_every = 0  # and every one whose step is a multiple of this; 0: none
  c.checkpoint.keep_best = ''  # and the best by this metric, such as eval/validation/loss

  c.guard = ConfigDict()
  c.guard.on_bad = 'stop'  # a loss or gradient that is not finite: stop, skip, roll_back
  c.guard.on_spike = ''  # a loss far above the last 128: '' (nothing), stop, skip, roll_back
  c.guard.deviations = 6.0  # how far, in standard deviations
  c.guard.limit = 10  # more batches skipped and roll-backs than these stop the run after all
  c.guard.replay = ''  # the events.jsonl of another run, whose decisions are taken again
  c.guard.replicas = 1000  # steps between comparisons of what devices hold in common; 0: none

  c.evaluate = ConfigDict()
  c.evaluate.every = 500  # steps between evaluations; the last step is always evaluated
  c.evaluate.batches = 0  # batches of each set; 0: all of it
  c.evaluate.yardstick = 0  # windows on which models of any objective compare: lmjax/yardstick.py

  c.log = ConfigDict()
  c.log.every = 10  # steps between lines of metrics.jsonl, which average over these steps
  c.log.tensorboard = True
  c.log.sample = ''  # a causal model continues this prompt at the end of the run
  return c.lock()


def choose(name: str, options: Mapping[str, Any]) -> Any:
  """options[name]: what an experiment's argument stands for."""
  if name not in options:
    raise UserError(f'this experiment has no variant "{name}"{did_you_mean(name, options)}')
  return options[name]


def _section(kind: str, name: str) -> ConfigDict:
  known = schema.knobs(kind)
  if name not in known:
    raise UserError(f'there is no {kind} "{name}"{did_you_mean(name, known)}')
  section = ConfigDict({'name': name})
  for key, (type_, default) in known[name].items():
    section[key] = config_dict.placeholder(type_) if default is None else default
  return section


# ------------------------------------------------------------------- from the outside to a config


def load(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """Loads 'experiments/x.py' or 'experiments/x.py:argument' and applies dotted overrides to it.

  It goes through the flags of the command line, so that an element of a sweep is a command line.
  """
  argv = ['lmjax', *flags_of(spec, overrides or {})]
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  parse_flags(argv, values)
  return holder.value


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Parses `argv` into absl flags; raises UserError for whatever is wrong with it."""
  for at, argument in enumerate(argv):
    if argument.lstrip('-').split('=')[0] == 'config' and argument != 'config':
      spec = argument.partition('=')[2] or ''.join(argv[at + 1 : at + 2])
      _check_overrides(_experiment(spec), argv)
  try:
    rest = values(argv)
  except flags.Error as e:
    raise UserError(_plain(str(e))) from e
  if len(rest) > 1:
    raise UserError(f'"{rest[1]}" is not a flag; flags begin with "--"')


def _plain(said: str) -> str:
  for words, ours in _SAID.items():
    if found := re.match(f'flag (--.+?)=(.*?): {words}', said, re.DOTALL):
      return f'{found[1]}={found[2]} {ours}'
  return said


def arms(spec: str) -> list[Overrides]:
  """The overrides of every arm of the file's sweep(); a UserError where it has none."""
  with _opened(spec) as module:
    found = module.sweep() if hasattr(module, 'sweep') else None
  if not (isinstance(found, list) and found and all(isinstance(arm, dict) for arm in found)):
    raise UserError(f'{spec} has no sweep() that returns a list of overrides')
  return found


def declared(spec: str, name: str, default: Any) -> Any:
  """What the file says of itself, such as TOPOLOGIES; `default` where it says nothing."""
  with _opened(spec) as module:
    found = getattr(module, name, default)
  if type(found) is not type(default):
    raise UserError(f'{name} of {spec} is no {type(default).__name__}')
  return found


def _experiment(spec: str) -> ConfigDict:
  file, _, argument = spec.partition(':')
  with _opened(spec) as module:
    if argument and not inspect.signature(module.get_config).parameters:
      raise UserError(f'{file} takes no argument, and "{argument}" was given')
    config = module.get_config(*([argument] if argument else []))
  if not isinstance(config, ConfigDict):
    raise UserError(f'get_config() of {file} returns {type(config).__name__}, not a ConfigDict')
  return config


@contextlib.contextmanager
def _opened(spec: str) -> Iterator[types.ModuleType]:
  """The module of an experiment, whose mistakes are named by file and line."""
  file = spec.partition(':')[0]
  if not pathlib.Path(file).is_file():
    raise UserError(f'there is no config file "{file}"')
  try:
    # The file is code that the user names on the command line; nothing read from disk is run.
    module_spec = importlib.util.spec_from_file_location('experiment', file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    yield module
  except UserError:
    raise
  except Exception as e:
    frames = traceback.extract_tb(e.__traceback__)
    lines = [f.lineno for f in frames if os.path.abspath(f.filename) == os.path.abspath(file)]
    line = lines[-1] if lines else getattr(e, 'lineno', 1)
    what = str(e).strip('\'"').splitlines()[0] if str(e) else ''
    if wrong := re.match('Key "(.+?)" does not exist', what):  # ml_collections shows all there is
      what = wrong[0] + did_you_mean(wrong[1], _every_key())
    raise UserError(f'{file}, line {line}: {type(e).__name__}: {what}') from e


def _every_key() -> set[str]:
  """The keys of all sections, whatever they are for."""
  kinds = map(schema.knobs, ('objective', 'model', 'tokenizer', 'optimizer'))
  keys = {key for kind in kinds for knobs in kind.values() for key in knobs}
  trees = [base()]
  for tree in trees:
    keys.update(tree)
    trees += [value for value in tree.values() if isinstance(value, ConfigDict)]
  return keys


def _check_overrides(config: ConfigDict, argv: list[str]) -> None:
  for argument in argv:
    flag = argument.lstrip('-').split('=')[0]
    tree, path = config, flag.split('.')[1:]
    if not (argument.startswith('-') and flag.startswith('config.')):
      continue
    for depth, key in enumerate(path):
      if (section := '.'.join(path[:depth])) in OPEN and key not in tree:
        whole = f'--config.{section}=\'{{"{key}": …}}\''
        raise UserError(f'{section} has no "{key}" yet; give the section as a whole: {whole}')
      if not isinstance(tree, ConfigDict) or key not in tree:
        known = tree if isinstance(tree, ConfigDict) else ()
        wrong = '.'.join(path[: depth + 1])
        raise UserError(f'there is no "{wrong}" in the config{did_you_mean(key, known)}')
      tree = tree[key]


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
  """The complete configuration as plain JSON values, every key known and of its type.

  Raises:
    UserError: an unknown section, key or name, a value of the wrong type or out of range.
  """
  given = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
  sections = {k: given[k] for k in ('objective', 'model', 'tokenizer') if k in given}
  for key, section in sections.items():
    if not isinstance(section, Mapping):
      raise UserError(f'{key} = {section!r} is not a section')
    if not isinstance(section.get('name', ''), str):
      raise UserError(f'{key}.name = {section["name"]!r} is not str')
  complete = base(**{k: section['name'] for k, section in sections.items() if 'name' in section})
  _merge(complete, given, '')
  for path, least in LEAST.items():
    value = functools.reduce(lambda tree, key: tree[key], path.split('.'), complete)
    if value < least:
      raise UserError(f'{path} = {value} must be at least {least}')
  if complete.steps >= 1 << 31:  # devices count updates in int32; all else is counted on the host
    raise UserError(f'steps = {complete.steps} must be below 2^31')
  return complete.to_dict()


def _merge(into: ConfigDict, given: Mapping[str, Any], prefix: str) -> None:
  for key, value in given.items():
    path = prefix + key
    if key not in into and 'name' in into:
      said = f'{prefix[:-1]} "{into.name}" has no "{key}"{did_you_mean(key, into)}'
      whole = f'--config.{prefix[:-1]}=\'{{"name": "{into.name}", …}}\''
      raise UserError(said + f'; another kind is given as a whole: {whole}' * ('(known' in said))
    if key not in into:
      raise UserError(f'there is no "{path}" in the config{did_you_mean(key, into)}')
    section = isinstance(into[key], ConfigDict)
    if section != isinstance(value, Mapping):
      raise UserError(f'{path} = {value!r} is not {"a section" if section else "a single value"}')
    if section and path not in OPEN:
      _merge(into[key], value, path + '.')
      continue
    if value is None and into[key] is not None:
      raise UserError(f'{path} = None is not {into.get_type(key).__name__}')
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f'{path} = {value} is not a finite number')
    if isinstance(value, bool) and into.get_type(key) is not bool:
      raise UserError(f'{path} = {value} is not {into.get_type(key).__name__}')
    try:
      into[key] = ConfigDict(value) if section else value
    except TypeError:
      raise UserError(f'{path} = {value!r} is not {into.get_type(key).__name__}') from None
