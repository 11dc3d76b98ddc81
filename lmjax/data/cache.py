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
  if not _whole(directory):
    with lock(directory):
      if not _whole(directory):
        print(f'training the tokenizer {options["name"]} on {source.spec}', flush=True)
        _keep(tokenizer.get(texts=texts, **options), directory)
  return tokenizer.load(str(directory))


def _whole(directory: epath.Path) -> bool:
  if not directory.exists():
    return False
  try:
    tokenizer.load(str(directory))
  except UserError as e:
    say(str(e))
    return False
  return True


def _keep(made: Tokenizer, directory: epath.Path) -> None:
  scratch, aside = (epath.Path(f'{directory}.{uuid.uuid4().hex[:8]}.tmp') for _ in range(2))
  scratch.mkdir(parents=True)
  made.save(str(scratch))
  with contextlib.suppress(FileNotFoundError):  # a damaged one
    directory.rename(aside)
    aside.rmtree()
  try:
    scratch.rename(directory)
  except OSError:  # another run made it at the same time, where there are no locks
    scratch.rmtree()
