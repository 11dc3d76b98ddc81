"""JSON files: written whole or not at all, and read with care, since they may be anybody's."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from lmjax import processes
from lmjax.errors import UserError

MOST = 64 << 20  # bytes of a file that is read at once


def read(path: epath.PathLike) -> dict[str, Any]:
  """The object in a file. UserError where there is none, or more than MOST bytes."""
  return parsed(read_bytes(path), path)


def read_bytes(path: epath.PathLike) -> bytes:
  """UserError where there are more than MOST."""
  with epath.Path(path).open('rb') as file:
    data = file.read(MOST + 1)
  if len(data) > MOST:
    raise UserError(f'{path} is larger than {MOST >> 20} MiB')
  return data


def read_lines(path: epath.PathLike) -> Iterator[dict[str, Any]]:
  """The objects of a file that has one a line; none of one that is not there.

  A last line without its end, which a process that was killed has left, is passed over.
  """
  if epath.Path(path).exists():
    with epath.Path(path).open('rb') as file:
      while (line := file.readline(MOST + 1)).endswith(b'\n') or len(line) > MOST:
        yield parsed(line, path)


def parsed(text: bytes | str, path: epath.PathLike) -> dict[str, Any]:
  """The object in a text of this file. UserError where there is none."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise UserError(f'{path} is damaged: {e}') from e
  if not isinstance(value, dict):
    raise UserError(f'{path} is damaged: it holds {type(value).__name__}, and no object')
  return value


def write(path: epath.Path, value: Any) -> None:
  """Process 0 writes a file, whole or not at all."""
  if processes.index() == 0:
    write_text(path, json.dumps(value, indent=2) + '\n')


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  scratch = path.parent / f'{path.name}.tmp'
  scratch.unlink(missing_ok=True)  # it may be a link
  with _naming(path):
    scratch.write_text(text)
  scratch.replace(path)


class Lines:
  """A file of objects, one a line, that is added to.

  In a bucket nothing is added to a file: there the whole is written again, now and then.
  """

  def __init__(self, path: epath.Path):
    self._path, self._bucket, self._text = path, '://' in str(path), ''
    self._written, self._took = time.monotonic(), 0.0
    if self._bucket:
      self._text = path.read_text() if path.exists() else ''
      return
    if os.path.islink(path):
      path.unlink()  # nothing is written to where it leads
    self._file = path.open('a')

  def add(self, *values: Any) -> None:
    text = ''.join(json.dumps(value) + '\n' for value in values)
    if not self._bucket:
      with _naming(self._path):
        self._file.write(text)
        self._file.flush()
      return
    self._text += text
    if time.monotonic() - self._written > max(60, 50 * self._took):
      self.sync()

  def sync(self) -> None:
    """Returns when all that was added is in the file."""
    if self._bucket:
      began = time.monotonic()
      write_text(self._path, self._text)
      self._written = time.monotonic()
      self._took = self._written - began

  def close(self) -> None:
    self.sync()
    if not self._bucket:
      with _naming(self._path):  # it tries again to write what it could not
        self._file.close()


@contextlib.contextmanager
def _naming(path: epath.Path) -> Iterator[None]:
  """An OSError in it says which file it was: those of writing to an open one do not."""
  try:
    yield
  except OSError as e:
    if e.errno is None:  # of a bucket, which says it
      raise
    raise OSError(e.errno, e.strerror, str(path)) from e
