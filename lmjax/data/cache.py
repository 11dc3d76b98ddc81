"""What is made once and kept in the cache, where several processes may want it at a time."""

import contextlib
import fcntl
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lmjax.data import tokenizer
from lmjax.data.pieces import Tokenizer
from lmjax.data.sources import Source
from lmjax.errors import UserError
from lmjax.terminal import say


@contextlib.contextmanager
def lock(directory: epath.Path) -> Iterator[bool]:
  """Of the processes that see one disk, only one at a time is in here, to make `directory`.

  False where there are no locks, as in buckets: there each makes it, and the last rename decides.
  """
  if '://' in str(directory):
    yield False
    return
  try:
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = open(f'{directory}.lock', 'w')  # noqa: SIM115
  except OSError as e:
    where = f'cannot keep anything in {directory.parent}'
    raise UserError(f'{where}: {e.strerror}: choose a cache') from e
  with file:
    alone = True
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'waiting for another process that makes {directory}', flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      alone = False
    yield alone


def trained(options: Mapping[str, Any], source: Source, cache: str) -> Tokenizer:
  """The tokenizer of a config, kept by what it is made of; a damaged one is made again."""
  texts = lambda: (source[i] for i in range(len(source)))
  if options.get('path'):
    return tokenizer.get(texts=texts, **options)
  key = json.dumps([options, source.fingerprint], sort_keys=True)
  digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
  directory = epath.Path(cache).expanduser() / 'tokenizers' / digest
  if isinstance(found := _kept(directory), str):
    with lock(directory):
      if isinstance(found := _kept(directory), str):
        if found:
          say(found)
        print(f'training the tokenizer {options["name"]} on {source.spec}', flush=True)
        found = tokenizer.get(texts=texts, **options)
        _keep(found, directory)
  return found


def _kept(directory: epath.Path) -> Tokenizer | str:
  """What is there, or why it is damaged; '' where nothing is.

  Raises:
    UserError: it cannot be read, which may pass.
  """
  try:
    return tokenizer.load(str(directory))
  except UserError as e:
    nothing = FileNotFoundError | NotADirectoryError
    if isinstance(e.__cause__, OSError) and not isinstance(e.__cause__, nothing):
      raise
    return str(e) if directory.exists() else ''


def _keep(made: Tokenizer, directory: epath.Path) -> None:
  scratch, aside = (epath.Path(f'{directory}.{uuid.uuid4().hex[:8]}.tmp') for _ in range(2))
  scratch.mkdir(parents=True)
  made.save(str(scratch))
  if isinstance(_kept(directory), str):  # where there are no locks, others may have been faster
    with contextlib.suppress(FileNotFoundError):
      directory.rename(aside)
      aside.rmtree()
  try:
    scratch.rename(directory)
  except OSError:
    scratch.rmtree()
