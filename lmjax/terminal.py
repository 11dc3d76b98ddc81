"""The person at the terminal, who may go away before the work is done."""

import io
import sys


def say(text: str) -> None:
  """A line of ours on stderr."""
  print(f'lmjax: {text}', file=sys.stderr, flush=True)


def outlive() -> None:
  """From here on what cannot be written there is lost, as when ssh breaks or `| head` is done."""
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    stream.flush()
    lasting = io.BufferedWriter(_Lasting(stream.fileno(), 'w', closefd=False))
    about = {'encoding': stream.encoding, 'errors': stream.errors}
    buffered = {'line_buffering': stream.line_buffering, 'write_through': stream.write_through}
    setattr(sys, name, io.TextIOWrapper(lasting, **about, **buffered))


class _Lasting(io.FileIO):
  def write(self, data: bytes) -> int | None:
    try:
      return super().write(data)
    except OSError:
      return len(data)
