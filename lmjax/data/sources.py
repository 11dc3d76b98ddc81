"""Text from anywhere as a random-access sequence of documents.

`open_source` understands three kinds of `spec`:

* `python`, `python#validation`: the embedded corpus, see `python_corpus`.
* `tfds:NAME[/CONFIG][:VERSION][#SPLIT]`: a TensorFlow Datasets data set kept as array_record below
  TFDS_DATA_DIR; SPLIT in TFDS syntax, `train` unless given.
* a file, directory or glob, local or `gs://`, with an optional slice of its documents such as
  `#[:90%]`; a document that is the only one is sliced by its characters.  `.jsonl` and `.json` hold
  one object a line, `.parquet` rows, anything else UTF-8 text; `.gz` or `.zst` may follow.

Sources are picklable, so that worker processes can read them.  A document may be an empty string.
What is not UTF-8 in one reads as U+FFFD; a file that begins with much of it is refused.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
from typing import Any, Protocol

from lmjax.config import did_you_mean
from lmjax.data import files, streams
from lmjax.errors import UserError

DOCUMENTS = ('file', 'line', 'paragraph')
# No namespaces, arguments or leading dots: with them TFDS would look, or import code, elsewhere.
_TFDS = re.compile(
  r'tfds:([a-z][a-z0-9_]*)((?:/[\w+-][\w.+-]*)?(?::\d+\.[\d*]+\.[\d*]+)?)(?:#(.+))?', re.ASCII
)
_TFDS_FEATURE = re.compile(r'tensorflow_datasets\.core\.features\.[\w.]+', re.ASCII)


class Source(Protocol):
  """A sequence of documents; `source[i]` is a text, or an IndexError unless 0 <= i < len."""

  spec: str
  fingerprint: str  # 16 hex digits that change when the documents or their order do

  @property
  def reads(self) -> set[str]:
    """Those of `document` and `text_key` that make a difference to it."""

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> str: ...


def open_source(
  spec: str, *, document: str = 'file', text_key: str = 'text', cache: str = '~/.cache/lmjax'
) -> Source:
  """Opens the documents that `spec` names (see the module's docstring).

  Args:
    spec: what to read.
    document: what one document is in plain text: a 'file', each non-empty 'line', or a 'paragraph'
      (the lines between blank ones); neither of these ends with its line's end.
    text_key: the JSON key, Parquet column or TFDS feature that holds the text.
    cache: local directory for what is prepared on the way (the `python` corpus).

  Raises:
    UserError: nothing there, not readable, not text, not in the announced format, or no text in it.
      JSON and compressed files and those split in lines are read through here, of other files only
      the beginning.
  """
  if document not in DOCUMENTS:
    raise UserError(f'document="{document}" is unknown{did_you_mean(document, DOCUMENTS)}')
  if spec.partition('#')[0] == 'python':
    source = _open_python(spec, cache)
  elif spec.startswith('tfds:'):
    source = _open_tfds(spec, text_key)
  else:
    source = files.open_files(spec, document, text_key)
  texts = (source[i] for i in range(len(source)))
  if not any(text and not text.isspace() for text in texts):
    raise UserError(f'{spec}: no document in it has any text; name another source')
  return source


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
  """One text feature of a split of a TFDS data set."""

  spec: str
  fingerprint: str
  text_key: str
  records: Any  # what builder.as_data_source(split) returns

  @property
  def reads(self) -> set[str]:
    return {'text_key'} if self.spec.startswith('tfds:') else set()

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, i: int) -> str:
    if not 0 <= i < len(self):
      raise IndexError(f'{self.spec}: no document {i} of {len(self)}')
    text = self.records[i][self.text_key]
    return streams.decoded(text) if isinstance(text, bytes) else text


def _open_python(spec: str, cache: str) -> TfdsSource:
  tfds = streams.require('tensorflow_datasets')
  from lmjax.data import python_corpus

  directory, summary = python_corpus.prepare(cache)
  try:
    builder = tfds.builder_from_directory(directory)
  except Exception as e:  # TFDS and its readers have no common class of errors
    raise UserError(f'{directory.parent}: damaged ({_brief(e)}); delete it to renew it') from e
  split = spec.partition('#')[2] or 'train'
  return _tfds_source(spec, builder, split, 'text', summary['content'])


def _open_tfds(spec: str, key: str) -> TfdsSource:
  match = _TFDS.fullmatch(spec)
  if not match:
    raise UserError(f'{spec}: not of the form tfds:NAME[/CONFIG][:VERSION][#SPLIT]')
  name, rest, split = match.groups()
  data_dir = os.path.expanduser(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
  for pattern in ('*/features.json', '*/*/features.json'):
    for path in (streams.path(data_dir) / name).glob(pattern):
      _refuse_foreign_code(path)
  tfds = streams.require('tensorflow_datasets')
  elsewhere = (
    f'pip install "lmjax[tfds]" if its builder needs TensorFlow, or prepare it elsewhere with '
    f'file_format="array_record" and copy it below {data_dir}'
  )
  try:
    builder = tfds.builder(name + rest, data_dir=data_dir, file_format='array_record')
    if not builder.is_prepared():
      builder.download_and_prepare()
  except tfds.core.registered.DatasetNotFoundError as e:
    near = difflib.get_close_matches(name, re.findall(r'\t- (\w+)', str(e)), n=1)
    hint = f' (did you mean "{near[0]}"?)' if near else ''
    raise UserError(
      f'{spec}: no such data set is known or prepared here{hint}; check the name, {elsewhere}'
    ) from e
  except Exception as e:  # whatever the builder's own code raises
    raise UserError(f'{spec}: TFDS cannot prepare it ({_brief(e)}); {elsewhere}') from e
  return _tfds_source(spec, builder, split or 'train', key, builder.info.full_name)


def _tfds_source(spec: str, builder: Any, split: str, key: str, identity: str) -> TfdsSource:
  features = builder.info.features
  names = {name for name, f in features.items() if f.shape == () and f.np_dtype in (object, str)}
  if key not in names:
    known = f'; of its features {sorted(features)} these are text: {sorted(names)}'
    raise UserError(f'{spec}: no text feature "{key}"{known}; set text_key')
  try:
    records = builder.as_data_source(split)
    size = len(records)
    _ = size and records[0]  # files are opened by reading
  except Exception as e:  # of many kinds
    splits = ', '.join(sorted(builder.info.splits))
    raise UserError(
      f'{spec}: cannot read split "{split}" ({_brief(e)}); the data set in {builder.data_dir} has '
      f'the splits {splits}; if it is damaged, delete it to have it prepared again'
    ) from e
  parts = json.dumps([identity, split, size, key])
  fingerprint = hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()
  return TfdsSource(spec, fingerprint, key, records)


def _refuse_foreign_code(path: Any) -> None:
  """TFDS imports whatever module a features.json names: allow none but its own features."""

  def check(value: object) -> None:
    if isinstance(value, list | dict):
      for item in value.values() if isinstance(value, dict) else value:
        check(item)
    if isinstance(value, dict):
      for name in (value.get(k) for k in ('type', 'pythonClassName', 'python_class_name')):
        if isinstance(name, str) and not _TFDS_FEATURE.fullmatch(name):
          raise UserError(f'{path}: names the class "{name}" outside TFDS; it is not imported')

  try:
    check(json.loads(path.read_text()))
  except UserError:
    raise
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f'{path}: damaged ({e}); delete the data set and prepare it again') from e


def _brief(e: Exception) -> str:
  """TFDS writes pages; their first line says what happened."""
  return f'{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:200]}'
