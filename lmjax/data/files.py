"""Documents in files: plain text, JSON lines and Parquet, indexed once and read at random."""

import array
import bisect
import contextlib
import dataclasses
import fractions
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from lmjax.config import did_you_mean
from lmjax.data import streams
from lmjax.data.streams import File
from lmjax.errors import UserError

MAX_LINE = 32 << 20  # bytes
_HEAD = 64 << 10  # bytes of each text file that are looked at before anything else
_ODD, _SHARE = 3, 1e-3  # where more than these are not UTF-8, the text is of another encoding
_MAGIC = (
  (b'%PDF-', 'a PDF'),
  (b'PK\3\4', 'a zip archive'),
  (b'\x1f\x8b', 'gzip data (call it .gz)'),
  (b'\x28\xb5\x2f\xfd', 'zstandard data (call it .zst)'),
  (b'BZh91AY', 'bzip2 data'),
  (b'\xfd7zXZ', 'xz data'),
  (b'PAR1', 'Parquet (call it .parquet)'),
  (b'\x89PNG', 'an image'),
  (b'\xff\xd8\xff', 'an image'),
  (b'\xff\xfe', 'UTF-16 text'),
  (b'\xfe\xff', 'UTF-16 text'),
)
_SLICE = re.compile(r'\[(?:(\d+(?:\.\d+)?)%)?:(?:(\d+(?:\.\d+)?)%)?\]', re.ASCII)
_EVERYTHING = (fractions.Fraction(0), fractions.Fraction(1))


@dataclasses.dataclass(frozen=True, eq=False)
class FileSource:
  """Documents `start` to `stop` of some files, in the order of their names."""

  spec: str
  fingerprint: str
  text_key: str
  files: tuple[File, ...]
  spans: tuple[array.array, ...]  # per file: see _index_lines and _index_parquet
  ends: tuple[int, ...]  # number of documents up to and including each file
  start: int
  stop: int
  characters: tuple[int, int | None] = (0, None)  # of a document; not all only where it is alone

  def __len__(self) -> int:
    return self.stop - self.start

  @property
  def reads(self) -> set[str]:
    return {'text_key' if file.unit in ('jsonl', 'parquet') else 'document' for file in self.files}

  def __getitem__(self, i: int) -> str:
    if not 0 <= i < len(self):
      raise IndexError(f'{self.spec}: no document {i} of {len(self)}')
    i += self.start
    f = bisect.bisect_right(self.ends, i)
    i -= self.ends[f - 1] if f else 0
    return self._read(self.files[f], self.spans[f], i)[slice(*self.characters)]

  def _read(self, file: File, spans: array.array, i: int) -> str:
    if file.unit == 'parquet':
      group = bisect.bisect_right(spans, i) - 1
      return _row_group(file, group, self.text_key)[i - spans[group]]
    start, end = spans[2 * i : 2 * i + 2]
    text = _decode(streams.read(file, start, end), start)
    if file.unit == 'jsonl':
      return _json_text(text, f'{file.path}: document {i}', self.text_key)
    return text


def open_files(spec: str, document: str, text_key: str) -> FileSource:
  """The documents of a path, directory or glob with an optional `#[a%:b%]`; see `open_source`."""
  name, hash_, tail = spec.rpartition('#')
  share = _EVERYTHING
  if hash_ and not streams.path(spec).exists():  # a file may have a # in its name
    share = _share(spec, tail)
  else:
    name = spec
  if not name:
    raise UserError(f'"{spec}" names no source; give a path, a glob, "python" or "tfds:NAME"')
  files = tuple(_file(path, document) for path in _find(name))
  spans, ends, total = [], [], 0
  for file in files:
    parquet = file.unit == 'parquet'
    spans.append(_index_parquet(file, text_key) if parquet else _index_lines(file, text_key))
    total += spans[-1][-1] if parquet else len(spans[-1]) // 2
    ends.append(total)
  parent = os.path.commonpath([os.path.dirname(file.path) for file in files])
  names = [[os.path.relpath(file.path, parent), file.size, file.mtime_ns] for file in files]
  identity = json.dumps([1, names, document, text_key, *map(str, share)])
  fingerprint = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
  source = FileSource(
    spec, fingerprint, text_key, files, tuple(spans), tuple(ends), start=0, stop=total
  )
  return source if share == _EVERYTHING or not total else _sliced(source, share)


def _sliced(source: FileSource, share: tuple[fractions.Fraction, ...]) -> FileSource:
  n = len(source[0]) if len(source) == 1 else len(source)
  start, stop = (int(n * part) for part in share)
  if start == stop:
    things = 'characters of its only document' if len(source) == 1 else 'documents'
    raise UserError(f'{source.spec}: none of the {n} {things} is in this slice; make it larger')
  if len(source) == 1:
    return dataclasses.replace(source, characters=(start, stop))
  return dataclasses.replace(source, start=start, stop=stop)


def _share(spec: str, text: str) -> tuple[fractions.Fraction, fractions.Fraction]:
  """'[10%:20%]' -> (1/10, 1/5); exact, so that adjoining slices share and lose nothing."""
  if match := _SLICE.fullmatch(text):
    low, high = (fractions.Fraction(p) / 100 for p in (match[1] or '0', match[2] or '100'))
    if low < high <= 1:
      return low, high
  raise UserError(f'{spec}: "#{text}" is no slice; write #[:90%], #[90%:] or #[10%:20%]')


def _find(name: str) -> list[str]:
  """The regular, non-hidden files that a path, directory or glob names, sorted."""
  if '://' in name and '**' in name:
    raise UserError(f'{name}: ** is not read in a bucket, whose every name it would ask for; use *')
  with streams.blaming(name):
    root = streams.path(name)
    if root.is_file():
      return [os.fspath(root)]
    if root.is_dir():
      paths = (below / file for below, _, files in root.walk() for file in files)
    else:
      root, paths = _glob(name)
    try:
      found = [os.fspath(p) for p in paths if not _hidden(p, root) and p.is_file()]
    except ValueError as e:
      raise UserError(f'{name}: not a glob ({e}); name a directory or write another') from e
  if not found:
    raise UserError(f'{name}: no file there; a source is a path, a glob, "python" or "tfds:NAME"')
  return sorted(found)


def _glob(name: str) -> tuple[Any, Iterator[Any]]:
  """The directory before the first wildcard, and what matches below it."""
  wild = re.search(r'[*?\[]', name)
  if not wild:
    return None, iter(())
  cut = name.rfind('/', 0, wild.start()) + 1
  # pathlib knows **, which epath refuses.
  kind = streams.path if '://' in name else pathlib.Path
  root = kind(os.fspath(streams.path(name[:cut] or '.')))
  return root, root.glob(name[cut:])


def _hidden(path: Any, root: Any) -> bool:
  return any(part.startswith('.') for part in path.relative_to(root).parts)


def _file(path: str, document: str) -> File:
  suffix = os.path.splitext(re.sub(r'\.(gz|zst)$', '', path))[1]
  unit = {'.jsonl': 'jsonl', '.json': 'jsonl', '.parquet': 'parquet'}.get(suffix, document)
  with streams.blaming(path):
    return File(path, unit, *streams.stat(path))


# ---- Plain text and JSON lines ------------------------------------------------------------------


def _index_lines(file: File, text_key: str) -> array.array:
  """Start and end byte of each document, one after the other; an end of -1 is the file's end."""
  _check_head(file)
  if file.unit == 'file':
    return array.array('q', (0, -1))
  spans = array.array('q')
  inside = False  # a paragraph
  for number, start, line in _lines(file):
    text = _decode(line, start)
    end = start + len(line.removesuffix(b'\n').removesuffix(b'\r'))
    if not text or text.isspace():
      inside = False
    elif inside:
      spans[-1] = end
    else:
      if file.unit == 'jsonl':
        _json_text(text, f'{file.path}:{number}', text_key)
      spans.extend((start, end))
      inside = file.unit == 'paragraph'
  return spans


def _lines(file: File) -> Iterator[tuple[int, int, bytes]]:
  """(line number from 1, byte offset, line with its end)."""
  with streams.blaming(file.path), streams.open_file(file) as f:
    number, start = 0, 0
    while line := f.readline(MAX_LINE + 1):
      number += 1
      if len(line) > MAX_LINE:
        raise UserError(
          f'{file.path}:{number}: a line longer than {MAX_LINE >> 20} MiB; break it, '
          'or read plain text with document="file"'
        )
      yield number, start, line
      start += len(line)


def _check_head(file: File) -> None:
  with streams.blaming(file.path), streams.open_file(file) as f:
    head = f.read(_HEAD)
  for magic, what in _MAGIC:
    if head.startswith(magic):
      raise UserError(f'{file.path}: {what}, not UTF-8 text; convert it or leave it out')
  if b'\0' in head:
    at = head.index(b'\0')
    raise UserError(f'{file.path}: binary (byte {at} is NUL), not text; leave it out')
  if len(head) == _HEAD:
    # The cut may go through a character: leave out all from the last byte that begins one.
    last = (i for i in range(_HEAD - 1, _HEAD - 5, -1) if head[i] & 0xC0 != 0x80)
    head = head[: next(last, _HEAD)]
  try:
    head.decode()
  except UnicodeDecodeError as e:
    odd = streams.decoded(head).count('\ufffd') - head.count(b'\xef\xbf\xbd')
    if odd > max(_ODD, _SHARE * len(head)):
      where = f'{file.path}: byte {e.start} ({head[e.start]:#04x})'
      raise UserError(f'{where} is not UTF-8, and there are {odd} such; convert the file') from e


def _decode(data: bytes, start: int) -> str:
  text = streams.decoded(data)
  return text if start else text.removeprefix('\ufeff')  # the byte order mark


def _json_text(line: str, where: str, key: str) -> str:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as e:
    why = getattr(e, 'msg', e)  # without json's own "line 1"
    raise UserError(f'{where}: not JSON ({why}); write one JSON object a line') from e
  if not isinstance(record, dict):
    kind = type(record).__name__
    raise UserError(f'{where}: not a JSON object but a {kind}; write one JSON object a line')
  if key not in record:
    raise UserError(f'{where}: no key "{key}"{did_you_mean(key, record)}; set text_key')
  text = record[key]
  if not isinstance(text, str):
    kind = type(text).__name__
    raise UserError(f'{where}: "{key}" is not a string but a {kind}; mend it or set text_key')
  return streams.valid(text)


# ---- Parquet ------------------------------------------------------------------------------------


def _index_parquet(file: File, key: str) -> array.array:
  """First row of each row group, and after them the number of rows."""
  types = streams.require('pyarrow').types
  with _parquet(file) as parquet:
    schema, metadata = parquet.schema_arrow, parquet.metadata
    if key not in schema.names:
      hint = did_you_mean(key, schema.names)
      raise UserError(f'{file.path}: no column "{key}"{hint}; set text_key')
    kind = schema.field(key).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind)):
      raise UserError(f'{file.path}: column "{key}" holds {kind}, not strings; set text_key')
    starts = array.array('q', (0,))
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
      if group.total_byte_size > streams.MAX_FILE:
        raise UserError(f'{file.path}: a row group above {streams.MAX_FILE >> 30} GiB; split it')
      starts.append(starts[-1] + group.num_rows)
    return starts


@functools.lru_cache(maxsize=4)
def _row_group(file: File, group: int, key: str) -> list[str]:
  with _parquet(file) as parquet:
    column = parquet.read_row_group(group, columns=[key]).column(0)
    texts = column.cast('large_string').cast('large_binary').to_pylist()
  if None in texts:
    row = f'row {texts.index(None)} of row group {group}'
    raise UserError(f'{file.path}: {row} has no "{key}"; drop the rows without')
  return [streams.decoded(text) for text in texts]


@contextlib.contextmanager
def _parquet(file: File) -> Iterator[Any]:
  pa, pq = streams.require('pyarrow'), streams.require('pyarrow.parquet')
  try:
    with streams.blaming(file.path), streams.open_file(file) as f:
      yield pq.ParquetFile(f, page_checksum_verification=True)
  except pa.ArrowException as e:
    raise UserError(f'{file.path}: damaged Parquet ({e}); fetch or write it again') from e
