"""Evaluates a checkpoint of a run on its named sets; prints JSON and writes eval_<step>.json."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags
from flax import linen as nn
from jax.sharding import Mesh

from lmjax import command, jsonio, record, sharding, yardstick
from lmjax.checkpoint import Checkpoints
from lmjax.config import did_you_mean
from lmjax.data import loader
from lmjax.errors import UserError
from lmjax.experiment import Experiment, keep_programs, open_run, run_path


def make_step(parts: Experiment) -> Callable:
  """(parameters, batch) -> (loss terms, metrics), compiled when it is first called."""
  apply = lambda params, batch: parts.model.apply({'params': params}, batch, train=False)
  return jax.jit(apply)


def lower(parts: Experiment, mesh: Mesh, params: Any) -> jax.stages.Lowered:
  """The step for such parameters, ready to be compiled."""
  batch, strategy = parts.abstract_batch(train=False), parts.config['sharding']['strategy']
  places = sharding.batch_shardings(batch, mesh, strategy)
  return make_step(parts).lower(params, sharding.placed(batch, places))


class Evaluator:
  """The objective's numbers on every evaluation set, with train=False."""

  def __init__(
    self, parts: Experiment, mesh: Mesh, over: Callable[[Callable], Callable] = lambda step: step
  ):
    """`over` wraps (parameters, batch) -> sums, where parameters are stacked."""
    self.parts, self.mesh = parts, mesh
    self._step = over(make_step(parts))
    self._shared = parts.config['evaluate'][yardstick.NAME] and yardstick.rows(parts)
    self._shared_step = over(yardstick.make_step(parts))

  def __call__(
    self, params: Any, stop: Callable[[], bool] = lambda: False
  ) -> dict[str, float] | None:
    """'eval/<set>/<name>' -> value: loss, its terms, the metrics, perplexity, bits per byte.

    None where `stop`, which is asked before every batch, says so.
    """
    sums = self.sums(params, stop)
    return None if sums is None else self.values(sums)

  def sums(
    self, params: Any, stop: Callable[[], bool] = lambda: False
  ) -> dict[str, list[Any]] | None:
    """Set -> what its batches add up to, each; None as above."""
    most = self.parts.config['evaluate']['batches']
    asked = {
      name: (self._step, self.parts.examples(name), most)
      for name in self.parts.config['data']['eval']
    }
    if self._shared:
      asked[yardstick.NAME] = self._shared_step, self._shared, 0
    found = {}
    for name, of in asked.items():
      found[name] = self._fetch(*of, params, stop)
      if found[name] is None:
        return None
    return found

  def values(self, sums: Mapping[str, list[Any]]) -> dict[str, float]:
    """What is said of such sums."""
    values = {}
    for name, fetched in sums.items():
      shared = name == yardstick.NAME
      found = yardstick.values(self.parts, fetched) if shared else self._values(name, fetched)
      values |= {f'eval/{name}/{key}': x for key, x in found.items()}
    return values

  def _fetch(
    self, step: Callable, examples: Any, most: int, params: Any, stop: Callable[[], bool]
  ) -> list[Any] | None:
    rows = self.parts.rows(self.mesh)
    fetched, running = [], None
    for batch in loader.eval_batches(examples, self.parts.config['batch'], most, rows):
      if stop():
        return None
      ahead = step(params, self.parts.place(batch, self.mesh))
      if running is not None:  # fetched a batch late, so that the device always has work
        fetched.append(jax.device_get(running))
      running = ahead
    return [*fetched, jax.device_get(running)]

  def _values(self, name: str, fetched: list[Any]) -> dict[str, float]:
    # Float32 counts no further than 2^24 targets.
    sums = jax.tree.map(lambda *parts: math.fsum(map(float, parts)), *fetched)
    terms, numbers = ({key: mean.compute() for key, mean in part.items()} for part in sums)
    values = {'loss': sum(terms.values()), **terms, **numbers}
    if 'xent' in numbers:
      values['perplexity'] = math.exp(min(numbers['xent'], 700))  # exp(710) overflows
    if self._encodes_all_text(name):
      # Of the original text, so that tokenizers compare; what a set leaves out counts as average.
      tokens = self.parts.stores[name]
      values['bits_per_byte'] = numbers['xent'] / math.log(2) * len(tokens) / tokens.num_bytes
    return values

  def _encodes_all_text(self, name: str) -> bool:
    """Whether the loss is that of the original text: of tokens that have lost nothing of it."""
    t = self.parts.tokenizer
    if not self.parts.objective.scores_every_token or t.name != 'characters':
      return self.parts.objective.scores_every_token and t.lossless
    return not any((shard == t.unk).any() for shard in self.parts.stores[name].shards)


def check_best(parts: Experiment) -> None:
  """Raises a UserError where checkpoint.keep_best is nothing that every checkpoint would have."""
  best, c = parts.config['checkpoint']['keep_best'], parts.config
  if not best:
    return
  if c['checkpoint']['every'] % c['evaluate']['every']:
    raise UserError(
      f'checkpoint.keep_best needs checkpoint.every = {c["checkpoint"]["every"]} to be a multiple '
      f'of evaluate.every = {c["evaluate"]["every"]}, so that every checkpoint is evaluated'
    )
  known = reported(parts)
  if best not in known:
    raise UserError(f'checkpoint.keep_best = "{best}" is not reported{did_you_mean(best, known)}')


def reported(parts: Experiment) -> list[str]:
  """The names of the numbers that an evaluation may have, but for those of the yardstick."""
  terms, numbers = jax.eval_shape(
    make_step(parts), nn.unbox(parts.boxed_shapes), parts.abstract_batch(train=False)
  )
  names = ['loss', *terms, *numbers, *(['perplexity'] if 'xent' in numbers else [])]
  names += ['bits_per_byte'] if parts.objective.scores_every_token else []
  return [f'eval/{name}/{key}' for name in parts.config['data']['eval'] for key in names]


def restore_params(
  parts: Experiment, workdir: str, mesh: Mesh, step: int | None = None, like: Any = None
) -> tuple[int, Any]:
  """(step, parameters) of a run's checkpoint; the averaged ones where the run keeps an average.

  `like` is a pytree of ShapeDtypeStructs with shardings; by default the run's own parameters.

  Raises:
    UserError: there is no checkpoint, or not that one, or it holds other parameters.
  """
  if like is None:
    like = parts.abstract_params(mesh)
  with Checkpoints(run_path(workdir) / 'checkpoints', read_only=True) as checkpoints:
    path = checkpoints.average_path(step) if parts.optimizer.ema else 'params'
    restored = checkpoints.restore_subtree(path, like, step)
  if restored is None:
    raise UserError(f'there is no checkpoint in {workdir}')
  return restored[0], restored[1]


def run(
  workdir: str | os.PathLike, step: int | None = None, windows: int | None = None
) -> dict[str, float]:
  """Evaluates a checkpoint, the newest by default, and writes <workdir>/eval_<step>.json.

  On so many `windows` of the yardstick; by default as the run's config says.
  """
  parts = open_run(workdir, evaluation=True)
  if windows is not None:
    chosen = {**parts.config['evaluate'], yardstick.NAME: windows}
    parts = dataclasses.replace(parts, config={**parts.config, 'evaluate': chosen})
  keep_programs(parts.config, run_path(workdir))
  record.check_data(run_path(workdir), parts.digests)
  mesh = sharding.mesh_of_run(parts.config, parts.boxed_shapes)
  sharding.check_batch({**parts.config, 'micro_batches': 1, 'deterministic_sum': False}, mesh)
  strategy = parts.config['sharding']['strategy']
  with jax.set_mesh(mesh), sharding.logical_axes(strategy):
    step, params = restore_params(parts, workdir, mesh, step)
    values = {'step': step, **Evaluator(parts, mesh)(params)}
  jsonio.write(run_path(workdir) / f'eval_{step}.json', values)
  return values


def main() -> None:
  if not flags.FLAGS.workdir:
    raise UserError('name the run with --workdir DIR')
  f = flags.FLAGS
  asked = {'workdir': f.workdir, 'step': f.step, 'windows': f.yardstick}
  with command.joined(lambda: record.flatten({**record.software(), **asked})):
    print(json.dumps(run(**asked), indent=2))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'The directory of the run.')
  flags.DEFINE_integer('step', None, 'The checkpoint; the newest by default.')
  windows = 'So many windows, on which models of any objective compare: lmjax/yardstick.py.'
  flags.DEFINE_integer('yardstick', None, windows, lower_bound=0)
  command.define_process_flags()
  command.run(main)
