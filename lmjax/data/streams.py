"""Bytes of files, plain or compressed, local or in a bucket; what goes wrong names the file."""

import contextlib
import dataclasses
import functools
import gzip
import importlib
import io
import os
import threading
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from lmjax.errors import UserError

MAX_FILE = 4 << 30  # bytes of a decompressed file: it is held in memory
_lock = threading.Lock()  # a handle has one position


@dataclasses.dataclass(frozen=True)
class File:
  """One file as it was when opened; `unit` is what a document is in it."""

  path: str
  unit: str  # file | line | paragraph | jsonl | parquet
  size: int  # bytes
  mtime_ns: int


def path(name: str) -> Any:
  """A pathlib-like path, local or of a bucket."""
  from etils import epath  # takes a third of the time of importing us

  return epath.Path(name).expanduser()


def stat(name: str) -> tuple[int, int]:
  """Size in bytes and time of the last change in ns."""
  if '://' in name:
    found = path(name).stat()
    return found.length, found.mtime * 10**9
  found = os.stat(name)  # epath rounds the time to seconds
  return found.st_size, found.st_mtime_ns


def open_file(file: File) -> BinaryIO:
  """The decompressed bytes of `file`.  Read it inside `blaming`."""
  if _compressed(file):
    return io.BytesIO(_decompressed(file))
  _check_unchanged(file)
  return path(file.path).open('rb')


def read(file: File, start: int, end: int) -> bytes:
  """The decompressed bytes from `start` up to `end`, or up to the end of the file if that is -1."""
  if _compressed(file):
    return _decompressed(file)[start : None if end < 0 else end]
  with blaming(file.path), _lock:
    f = _handle(file, os.getpid())
    f.seek(start)
    return f.read(end - start if end >= 0 else -1)


@contextlib.contextmanager
def blaming(name: str) -> Iterator[None]:
  """Turns what reading raises into a UserError that names the file."""
  try:
    yield
  except (OSError, EOFError, zlib.error) as e:
    raise UserError(f'{name}: cannot be read ({e}); check it or fetch it again') from e


def decoded(data: bytes) -> str:
  """The text that is UTF-8; what is none reads as U+FFFD, which a token store counts."""
  return data.decode(errors='replace')


def valid(text: str) -> str:
  """The same, with U+FFFD for halves of surrogate pairs."""
  return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def require(name: str) -> Any:
  """An optional or slow library, imported where it is needed."""
  try:
    return importlib.import_module(name)
  except ImportError as e:
    raise UserError(f'this source needs {name} ({e}); pip install {name.partition(".")[0]}') from e


@functools.lru_cache(maxsize=64)
def _handle(file: File, pid: int) -> BinaryIO:
  """An open file; by process, because a forked child would move its parent's position."""
  del pid
  return open_file(file)


def _check_unchanged(file: File) -> None:
  if stat(file.path) != (file.size, file.mtime_ns):
    raise UserError(f'{file.path}: it changed while it was in use; start again')


def _compressed(file: File) -> bool:
  return file.path.endswith(('.gz', '.zst'))


@functools.lru_cache(maxsize=2)
def _decompressed(file: File) -> bytes:
  out = io.BytesIO()
  with blaming(file.path):
    _check_unchanged(file)
    with path(file.path).open('rb') as f:
      for piece in (_gunzip if file.path.endswith('.gz') else _unzstd)(f):
        out.write(piece)
        if out.tell() > MAX_FILE:
          raise UserError(f'{file.path}: over {MAX_FILE >> 30} GiB decompressed; split the file')
  return out.getvalue()


def _gunzip(f: BinaryIO) -> Iterator[bytes]:
  with gzip.GzipFile(fileobj=f) as unzipped:
    while piece := unzipped.read(1 << 20):
      yield piece


def _unzstd(f: BinaryIO) -> Iterator[bytes]:
  zstandard = require('zstandard')
  frame = None
  try:
    while data := f.read(4096):  # so little cannot fill the memory in one step
      while data:
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        yield frame.decompress(data)
        frame, data = (None, frame.unused_data) if frame.eof else (frame, b'')
  except zstandard.ZstdError as e:
    raise EOFError(e) from e
  if frame:
    raise EOFError('it ends in the middle of a frame')
