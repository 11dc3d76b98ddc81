"""The embedded corpus: the reading matter that every Python installation carries.

Documents are the standard library's sources, the topics of `help()` and the docstrings of the
modules built into the interpreter.  It needs no network and no TensorFlow, and is meant for first
steps and tests: it differs between Python versions and distributions, so never compare runs of
different machines on it without comparing the fingerprints of their sources.
"""

import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import json
import os
import pathlib
import shutil
import sys
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Iterator

import tensorflow_datasets as tfds
from absl import logging

from lmjax.errors import UserError

MIN_DOCUMENTS = 100
MIN_BYTES = 1_000_000
_FORMAT = '1.0.0'  # raise it whenever the same installation would yield other documents
_NOT_TEXT = {'__pycache__', 'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'}
_TOPICS = 'pydoc_data/topics.py'


class LmjaxPython(tfds.core.GeneratorBasedBuilder):
  """TFDS builder of the embedded corpus: features `name` and `text`, splits train, validation."""

  VERSION = tfds.core.Version(_FORMAT)

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({k: tfds.features.Text() for k in ('name', 'text')}),
      description=__doc__,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
    del dl_manager
    documents, skipped = collect()
    size = sum(len(text.encode()) for text in documents.values())
    if len(documents) < MIN_DOCUMENTS or size < MIN_BYTES:
      raise UserError(
        f'{stdlib()}: this Python carries only {len(documents)} readable documents ({size} bytes), '
        'so it was installed without its sources; use another data source, or a complete Python'
      )
    splits = {'train': {}, 'validation': {}}
    for name, text in documents.items():
      splits[split_of(name)][name] = text
    self.summary = {  # what `prepare` writes beside the data
      'content': _hash([[split, sorted(texts.items())] for split, texts in splits.items()]),
      'skipped': skipped,
      'documents': {split: len(texts) for split, texts in splits.items()},
      'bytes': {k: sum(len(t.encode()) for t in texts.values()) for k, texts in splits.items()},
    }
    return {split: self._generate_examples(texts) for split, texts in splits.items()}

  def _generate_examples(self, documents: dict[str, str]) -> Iterator[tuple[str, dict]]:
    for name, text in documents.items():
      yield name, {'name': name, 'text': text}


def prepare(cache: str) -> tuple[pathlib.Path, dict]:
  """Prepares the corpus of the running interpreter once; later calls only look it up.

  Args:
    cache: local directory; the corpus goes below `<cache>/tfds`.

  Returns:
    The TFDS directory of the prepared data set, and its summary: `content` (hash of names, texts
    and splits), and per split the number of `documents` and of UTF-8 `bytes`.

  Raises:
    UserError: the interpreter was installed without its sources, or `cache` is not writable.
  """
  root = pathlib.Path(cache).expanduser() / 'tfds'
  config = f'py{sys.version_info.major}{sys.version_info.minor}_{installation()}'
  final = root / LmjaxPython.name / config
  try:
    if not (final / 'corpus.json').exists():
      root.mkdir(parents=True, exist_ok=True)
      print('collecting the texts that this Python carries', flush=True)
      _prepare(root, config, final)
    return final / _FORMAT, json.loads((final / 'corpus.json').read_text())
  except OSError as e:
    raise UserError(
      f'{root}: cannot keep the "python" corpus there ({e}); set another cache'
    ) from e


def _prepare(root: pathlib.Path, config: str, final: pathlib.Path) -> None:
  """Prepares in a directory of its own and renames: readers see nothing or all of it."""
  scratch = pathlib.Path(tempfile.mkdtemp(prefix='.preparing-', dir=root))
  try:
    tfds.disable_progress_bar()
    with _quiet():
      builder = LmjaxPython(
        data_dir=os.fspath(scratch),
        config=tfds.core.BuilderConfig(name=config, version=_FORMAT),
        file_format='array_record',
      )
      builder.download_and_prepare()
    made = scratch / LmjaxPython.name / config
    (made / 'corpus.json').write_text(json.dumps(builder.summary, indent=1))
    final.parent.mkdir(exist_ok=True)
    try:
      made.rename(final)
    except OSError:
      # Another process was first; its corpus is the same as ours.
      if not (final / 'corpus.json').exists():
        raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """TFDS announces a download and warns of a custom configuration: neither concerns the user."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)


def collect() -> tuple[dict[str, str], dict[str, int]]:
  """Every document of this installation, by name in sorted order, without duplicates.

  A document more than half of whose text (its non-blank lines, weighted by length) stands in
  earlier ones is dropped: the tables below `encodings/` would otherwise teach little else.

  Returns:
    name -> text, and how many were skipped as `undecodable` and as `repeated`.
  """
  documents, skipped = {}, {'undecodable': 0, 'repeated': 0}
  for name, path in _sources().items():
    try:
      with tokenize.open(path) as f:
        documents[f'stdlib/{name}'] = f.read()
    except (SyntaxError, UnicodeDecodeError):
      skipped['undecodable'] += 1
  documents |= {f'topics/{name}': text for name, text in _topics().items()}
  documents |= {f'builtin/{name}': _docstrings(name) for name in sys.builtin_module_names}

  kept, seen = {}, set()
  for name, text in sorted(documents.items()):
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    repeated = sum(len(line) for line in lines if line in seen)
    if 2 * repeated > sum(map(len, lines)):
      skipped['repeated'] += 1
    elif lines:
      kept[name] = text
      seen.update(lines)
  return kept, skipped


def split_of(name: str) -> str:
  """'train' or, for about one document in twenty, 'validation'; the same on every machine."""
  return 'validation' if int(_hash(name), 16) % 20 == 0 else 'train'


def stdlib() -> pathlib.Path:
  """The directory of the running interpreter's standard library."""
  return pathlib.Path(sysconfig.get_paths()['stdlib'])


@functools.cache
def installation() -> str:
  """Hash of all that decides the documents, without reading them: names and sizes of the files."""
  files = {**_sources(), _TOPICS: stdlib() / _TOPICS}
  sizes = [[name, path.stat().st_size] for name, path in files.items() if path.exists()]
  return _hash([_FORMAT, sys.version, sorted(sys.builtin_module_names), sizes])


def _sources() -> dict[str, pathlib.Path]:
  """Relative name -> path of every source file, sorted; the topics are documents of their own."""
  found = {}
  for directory, below, files in os.walk(stdlib()):
    below[:] = sorted(set(below) - _NOT_TEXT)
    for path in (pathlib.Path(directory, file) for file in files if file.endswith('.py')):
      # The build's own settings are a table that differs between machines and names their paths.
      if not path.name.startswith('_sysconfigdata'):
        found[path.relative_to(stdlib()).as_posix()] = path
  found.pop(_TOPICS, None)
  return dict(sorted(found.items()))


def _topics() -> dict[str, str]:
  try:
    return importlib.import_module('pydoc_data.topics').topics
  except ImportError:  # some distributions ship it in a package apart
    return {}


def _docstrings(module_name: str) -> str:
  """The documentation of a module written in C: its own, its functions', classes', methods'."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # deprecated modules are documented all the same
    try:
      module = importlib.import_module(module_name)
    except ImportError:
      return ''
  parts = [module.__doc__]
  for name, value in sorted(vars(module).items()):
    # Notebooks and test runners plant functions of theirs in `builtins` and replace the hooks of
    # `sys`: only what is written in C and never replaced is the same in every process.
    planted = name.startswith('_') or name.endswith('hook') or name == 'input'
    if planted or not (inspect.isbuiltin(value) or inspect.isclass(value)):
      continue
    parts.append(value.__doc__ and f'{module_name}.{name}\n{inspect.cleandoc(value.__doc__)}')
    for method, member in sorted(vars(value).items()) if inspect.isclass(value) else ():
      if not method.startswith('_') and inspect.isroutine(member) and member.__doc__:
        parts.append(f'{module_name}.{name}.{method}\n{inspect.cleandoc(member.__doc__)}')
  return '\n\n'.join(part for part in parts if part)


def _hash(value: object) -> str:
  return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()
