"""The person at the terminal, who may go away before the work is done."""

import contextlib
import io
import os
import sys


def say(text: str) -> None:
  """A line of ours on stderr, if that is still there."""
  with contextlib.suppress(OSError, ValueError):
    print(f'lmjax: {text}', file=sys.stderr, flush=True)


def has_colours() -> bool:
  """Whether stdout is a terminal that understands them, and nobody has asked for none."""
  plain = os.environ.get('NO_COLOR') or os.environ.get('TERM') == 'dumb'
  return not plain and sys.stdout.isatty()


def flush() -> None:
  """Writes what is held back, before the process ends without Python's help."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      stream.flush()


def outlive() -> None:
  """From here on what cannot be written there is lost, as when ssh breaks or `| head` is done."""
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if stream is None or stream is not getattr(sys, f'__{name}__'):  # closed, or somebody else's
      continue
    stream.flush()
    lasting = io.BufferedWriter(_Lasting(stream.fileno(), 'w', closefd=False))
    about = {'encoding': stream.encoding, 'errors': stream.errors}
    at_once = stream.line_buffering or stream.write_through  # the latter of python -u
    made = io.TextIOWrapper(lasting, **about, line_buffering=at_once)
    setattr(sys, name, made)


class _Lasting(io.FileIO):
  def write(self, data: bytes) -> int | None:
    try:
      written = super().write(data)
    except OSError:
      written = None
    return len(data) if written is None else written  # None: it does not take any now
