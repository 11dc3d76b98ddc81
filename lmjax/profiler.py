"""A window of steps whose trace is kept, to be opened in TensorBoard or xprof."""

import contextlib
import re
from typing import Any

import jax
from etils import epath

from lmjax.errors import UserError


class Window:
  """Traces the steps from the first to the last, given as 'FIRST:LAST'; '' traces none."""

  def __init__(self, steps: str, directory: epath.Path, most: int):
    if steps and not re.fullmatch(r'\d+:\d+', steps):
      raise UserError(f'--profile={steps} is not FIRST:LAST, as 10:15 is')
    self._first, self._last = map(int, steps.split(':')) if steps else (0, 0)
    if steps and not 1 <= self._first <= self._last <= most:
      raise UserError(f'--profile={steps} is no window in the steps 1 to {most} of the run')
    self._directory, self._open, self._tracing = directory, contextlib.ExitStack(), False

  def __enter__(self) -> 'Window':
    return self

  def __exit__(self, *_: object) -> None:
    self._open.close()
    if self._last and not self._tracing:
      print(f'no trace: the run did not come to the steps {self._first} to {self._last}')

  def before(self, step: int) -> None:
    # A run that is resumed in the window traces what is left of it.
    if self._first <= step <= self._last and not self._tracing:
      self._open.enter_context(jax.profiler.trace(str(self._directory)))
      self._tracing = True

  def after(self, step: int, results: Any) -> None:
    """`results` of the step are waited for where it is the last."""
    if step == self._last and self._tracing:
      jax.block_until_ready(results)
      self._open.close()
      print(f'the trace of the steps to {step} is in {self._directory}')
