"""A window of steps whose trace is kept, to be opened in TensorBoard or xprof."""

import contextlib
import re
from typing import Any

import jax
from etils import epath

from lmjax.config import UserError


class Window:
  """Traces the steps from the first to the last, given as 'FIRST:LAST'; '' traces none."""

  def __init__(self, steps: str, directory: epath.Path):
    if steps and not re.fullmatch(r'\d+:\d+', steps):
      raise UserError(f'--profile={steps} is not FIRST:LAST, as 10:15 is')
    self._first, self._last = map(int, steps.split(':')) if steps else (0, 0)
    if self._first > self._last:
      raise UserError(f'--profile={steps} ends before it begins')
    self._directory, self._open = directory, contextlib.ExitStack()

  def __enter__(self) -> 'Window':
    return self

  def __exit__(self, *_: object) -> None:
    self._open.close()

  def before(self, step: int) -> None:
    if step == self._first:
      self._open.enter_context(jax.profiler.trace(str(self._directory)))

  def after(self, step: int, results: Any) -> None:
    """`results` of the step are waited for where it is the last."""
    if step == self._last:
      jax.block_until_ready(results)
      self._open.close()
