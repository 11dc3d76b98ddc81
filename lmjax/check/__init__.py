"""Oracles: what must hold of any experiment, tried on a small twin before it costs anything.

An oracle is a function of the twin whose docstring says what must hold, and which says what it saw.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from lmjax import processes
from lmjax.check import examples, learning, seeing, twin
from lmjax.check.twin import Finding, Twin
from lmjax.errors import UserError

ORACLES: dict[str, Callable[[Twin], Finding]] = {
  oracle.__name__: oracle
  for oracle in (
    examples.function_of_the_step,
    examples.every_token,
    examples.next_token,
    examples.hidden,
    learning.first_loss,
    seeing.causality,
    seeing.order,
    seeing.rows,
    seeing.documents,
    seeing.packing,
    seeing.padding,
    seeing.targets,
    seeing.determinism,
    learning.gradients,
    learning.slope,
    learning.by_heart,
    learning.optimizer,
    learning.decay,
    learning.noise,
    learning.micro_batches,
    learning.sharded,
    learning.bfloat16,
  )
}
_WORDS = {True: 'holds', False: 'FAILS', None: '-'}


def examine(config: Mapping[str, Any]) -> Iterator[tuple[str, Finding]]:
  """(name, finding) of each oracle, as it is found, of a resolved config.

  Raises:
    UserError: the parts of the experiment do not fit together.
  """
  made = twin.of(config)
  for name, oracle in ORACLES.items():
    yield name, oracle(made)


def line(name: str, finding: Finding) -> str:
  """For people; of a failure also what should hold, and what it means."""
  said = f'{_WORDS[finding.holds]:>5}  {name}: {finding.saw}'
  if finding.holds is False:
    said += f'\n       It should be so: {ORACLES[name].__doc__}\n       {finding.meaning}'
  return said


def require(config: Mapping[str, Any], path: epath.Path) -> None:
  """Examines an experiment whose run is about to begin, where it asks for that, at process 0.

  Raises:
    UserError: what does not hold.
  """
  # With --debug nothing is compiled, and each oracle would take minutes.
  if not config['check'] or (path / 'config.json').exists() or jax.config.jax_disable_jit:
    return
  wrong = processes.share(_failures(config) if processes.index() == 0 else '')
  if wrong:
    raise UserError(
      'on a small twin of this experiment not all holds that should (python -m lmjax.check tries '
      f'it again; check=False trains all the same)\n{wrong}'
    )


def _failures(config: Mapping[str, Any]) -> str:
  print('trying the oracles on a small twin', flush=True)
  began, findings = time.monotonic(), list(examine(config))
  count = sum(finding.holds is not None for _, finding in findings)
  failed = [line(name, finding) for name, finding in findings if finding.holds is False]
  if not failed:
    print(f'{count} oracles hold on a small twin ({time.monotonic() - began:.0f} s)', flush=True)
  return '\n'.join(failed)
