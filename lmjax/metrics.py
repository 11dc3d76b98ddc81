"""Numbers on their way out: sums with weights, floating-point work, and where they are written."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import tqdm
from etils import epath

from lmjax import jsonio, processes
from lmjax.errors import UserError


class Mean(NamedTuple):
  """A sum and its weight; added over devices, micro-batches and batches, and divided once.

  The mean of two means is wrong whenever their weights differ, as those of masked batches do.
  """

  total: jax.Array | float
  weight: jax.Array | float

  def __add__(self, other: 'Mean') -> 'Mean':
    return Mean(self.total + other.total, self.weight + other.weight)

  def compute(self) -> float:
    return float(self.total) / float(self.weight) if self.weight else math.nan


# -------------------------------------------------------------------------- floating-point work


def matmul_flops(function: Callable, *args: Any) -> int:
  """Multiply-adds x 2 of every matrix product in `function(*args)`, with trip counts of scans.

  Counted on the traced program, so it is exact for any model; args may be ShapeDtypeStructs.
  A product that a mask makes useless, such as the upper half of causal attention, is counted.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    times = eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else 1
    if eqn.primitive.name == 'dot_general':
      (contract, _), _ = eqn.params['dimension_numbers']
      inner = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
      total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    for sub in jax.extend.core.jaxprs_in_params(eqn.params):
      total += times * _count(sub)
  return total


# --------------------------------------------------------------------------------------- writing


class Log:
  """What a run says: metrics.jsonl and ledger.jsonl, TensorBoard, a bar or lines for a person.

  Of several processes all keep a log, since all add to the ledger, and process 0 writes it.
  Numbers stay on the device until a step is due to be written, and then it is the step before the
  one that is running, so that the host never holds the device up.
  """

  def __init__(
    self,
    workdir: epath.Path,
    start: int,
    steps: int,
    options: Mapping[str, Any],
    cost: Mapping[str, float],
    accepts: Callable[[int, Mapping[str, Any]], bool],
    held: Sequence[Any] = (),
    evaluated: bool = True,
    whose: str = '',
  ):
    """`cost` of a step: tokens, flops, and the peak in FLOP/s of all devices together.

    `accepts` looks at what the guard has found in a step, and may raise. `held` is what `hold`
    returned, and `evaluated` says whether the evaluation that was due after step `start` came
    before its checkpoint.  `whose` stands before lines that are beside those of other runs.
    """
    self._whose = whose
    self._steps, self._every, self._cost, self._accepts = steps, options['every'], cost, accepts
    self._files: dict[str, jsonio.Lines] = {}
    self._writes = processes.index() == 0
    for name in ('metrics', 'ledger') if self._writes else ():
      path = workdir / f'{name}.jsonl'
      # What is held back was written by a start that came further, and was killed.
      last = min([start + 1, *(step for step, *_ in held)]) - 1 if name == 'ledger' else start
      _truncate(path, last, evaluated)
      self._files[name] = jsonio.Lines(path)
    self._board = None
    if options['tensorboard'] and self._writes:
      import tensorboardX  # takes 0.2 s to import

      self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=start + 1)
    self._bar = tqdm.tqdm(
      total=steps, initial=start, unit='step', disable=not sys.stdout.isatty(), file=sys.stdout
    )
    mean = lambda part: {name: Mean(*pair) for name, pair in part.items()}
    self._settled = [
      (step, hash_, n and n | {'terms': mean(n['terms']), 'metrics': mean(n['metrics'])})
      for step, hash_, n in held
    ]
    self._pending: list[tuple[int, int, Any]] = []
    self.restart_clock()

  def __enter__(self) -> 'Log':
    return self

  def __exit__(self, *_: object) -> None:
    for file in self._files.values():
      file.close()
    if self._board:
      self._board.close()
    self._bar.close()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Times what the step waits for its input."""
    began = time.perf_counter()
    yield
    self._waited += time.perf_counter() - began

  def restart_clock(self) -> None:
    """Leaves out of tokens per second what was not training."""
    self._began, self._waited = time.perf_counter(), 0.0

  def push(self, step: int, fingerprint: int, numbers: Mapping[str, Any] | None) -> None:
    """Takes a step's numbers, still on the device; writes those before it when they are due.

    `fingerprint` is that of the rows that this process counts; a step that was skipped has no
    numbers.
    """
    if self._pending and self._pending[-1][0] % self._every == 0:
      self.flush()
    self._pending.append((step, fingerprint, numbers))

  def flush(self) -> None:
    """Writes all steps so far.

    Raises what `accepts` does.
    """
    seconds, waited, count = time.perf_counter() - self._began, self._waited, len(self._pending)
    self._settle()
    steps, hashes, numbers = zip(*self._settled, strict=True)
    self._settled = []
    self.restart_clock()
    if self._writes:
      totals = zip(steps, hashes, strict=True)
      self._files['ledger'].add(*({'step': step, 'hash': f'{x:016x}'} for step, x in totals))
    self._bar.update(len(steps))
    made = [n for n in numbers if n]
    values = {}
    if made:
      values = _average([n['terms'] for n in made], [n['metrics'] for n in made])
      values |= {f'optimizer/{key}': float(x) for key, x in made[-1]['optimizer'].items()}
    if len(made) < len(numbers):
      values['guard/skipped'] = len(numbers) - len(made)
    rate = count / seconds
    values |= {
      'perf/tokens_per_second': rate * self._cost['tokens'],
      'perf/data_wait': waited / seconds,
    }
    if not math.isnan(self._cost['peak']):
      values['perf/mfu'] = rate * self._cost['flops'] / self._cost['peak']
    self.write(steps[-1], values)

  def sync(self) -> None:
    """Returns when the files hold what was written, as they must before a checkpoint is saved."""
    for file in self._files.values():
      file.sync()

  def hold(self) -> list[Any]:
    """What is not due to be written yet, in JSON, so that a run taken up here writes it when it is.

    Raises what `accepts` does.
    """
    if self._pending and self._pending[-1][0] % self._every == 0:
      self.flush()  # it is due, and would otherwise be a part of the next line
    self._settle()
    return [[step, total, jax.tree.map(float, n)] for step, total, n in self._settled]

  def _settle(self) -> None:
    """Fetches the numbers of all steps so far, and looks at them."""
    steps, fingerprints, numbers = zip(*self._pending, strict=True) if self._pending else [()] * 3
    self._pending = []
    numbers = jax.device_get(numbers)
    everyones = processes.collect(fingerprints) or [[0] * len(steps)]
    hashes = [sum(parts) % (1 << 64) for parts in zip(*everyones, strict=True)]
    for step, total, found in zip(steps, hashes, numbers, strict=True):
      taken = found and self._accepts(step, found.pop('guard'))
      self._settled.append((step, total, found if taken else None))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    if not self._writes:
      return
    self._files['metrics'].add({'step': step, **values})
    if self._board:
      for key, value in values.items():
        self._board.add_scalar(key, value, step)
    self._bar.write(self._whose + line(step, values, self._steps), file=sys.stdout)
    sys.stdout.flush()


def check_ledger(workdir: epath.Path, step: int, held: Iterable[Any], fingerprint: int) -> None:
  """Raises a UserError where the batch of a logged step would be another one today.

  `held` is what `Log.hold` returned; `fingerprint` that of the rows that this process counts.
  """
  parts = processes.collect(fingerprint)
  wrong = ''
  if parts:
    now = sum(parts) % (1 << 64)
    path = workdir / 'ledger.jsonl'
    known = {line['step']: line['hash'] for line in jsonio.read_lines(path) if line['step'] == step}
    known |= {at: f'{total:016x}' for at, total, _ in held if at == step}
    if known.get(step, f'{now:016x}') != f'{now:016x}':
      wrong = (
        f'the batch of step {step} was {known[step]} in {workdir} and is {now:016x} now: the '
        'data, or what makes batches of them, have changed, and the run cannot be taken up'
      )
  if wrong := processes.share(wrong):
    raise UserError(wrong)


def line(step: int, values: Mapping[str, float], steps: int | None = None) -> str:
  """A line for a person: the step and the short names of the numbers."""
  loss = [x for key, x in values.items() if key.endswith('/loss')]  # may be its only term as well
  new = {key: x for key, x in values.items() if key.endswith('/loss') or x not in loss}
  shown = {key: x for key, x in new.items() if not key.startswith('perf/') or 'tokens' in key}
  words = [f'{key.removeprefix("train/")} {_short(key, x)}' for key, x in shown.items()]
  return f'step {step}{f"/{steps}" if steps else ""}  ' + '  '.join(words)


def _short(key: str, value: float) -> str:
  return f'{value:,.0f}' if 'per_second' in key else f'{value:.4g}'


def _average(terms: list, numbers: list) -> dict[str, float]:
  """'train/<name>' -> value over some steps; 'train/loss' is the sum of the terms.

  What had no weight in these steps, as pairs have none in a batch of padding, has no value.
  """
  means = {}
  for part in (terms, numbers):
    for key in part[0]:
      total = Mean(0.0, 0.0)
      for result in part:
        total += Mean(*map(float, result[key]))
      if total.weight:
        means[f'train/{key}'] = total.compute()
  loss = sum(means.get(f'train/{key}', 0.0) for key in terms[0])
  return {'train/loss': loss, **means}


def _truncate(path: epath.Path, step: int, evaluated: bool) -> None:
  """Keeps whole lines up to `step`: what a killed run wrote after its checkpoint comes again.

  So does the evaluation of that step where the checkpoint is from before it.
  """
  if not path.exists():
    return
  kept = []
  for text in path.read_bytes().splitlines(keepends=True):
    line = jsonio.parsed(text, path) if text.endswith(b'\n') else {'step': math.inf}
    again = line['step'] == step and not evaluated and any(key.startswith('eval/') for key in line)
    if line['step'] <= step and not again:
      kept.append(text)
  jsonio.write_text(path, b''.join(kept).decode())
