"""Schedules, and every optimizer of optax by name, with masks decided from logical axis names."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from lmjax.config import did_you_mean
from lmjax.errors import UserError

SCHEDULES = ('constant', 'linear', 'cosine', 'rsqrt', 'wsd')
_LIMITS = dict.fromkeys(('lr', 'final_lr', 'weight_decay', 'clip', 'eps', 'warmup_steps'), math.inf)
_LIMITS |= dict.fromkeys(('decay_fraction', 'ema', 'b1', 'b2', 'momentum'), 1)
_OPTIONAL = ('b1', 'b2', 'eps', 'momentum')
# Arguments of optax that lr, weight_decay and the axis names decide.
_OURS = {'learning_rate', 'weight_decay', 'weight_decay_rate', 'adam_weight_decay', 'mask'}
_OURS |= {'weight_decay_mask', 'muon_weight_dimension_numbers'}
# These want the loss or its curvature at every update, a step size that is no schedule, gradients
# of single examples, or (schedule_free) are evaluated at other parameters than they train.
_UNUSABLE = {'dpsgd', 'lbfgs', 'momo', 'momo_adam', 'noisy_sgd', 'optimistic_adam', 'rprop', 'sm3'}
_UNUSABLE |= {'sophia', 'schedule_free', 'schedule_free_adamw', 'schedule_free_sgd'}
# Their steps depend on norms of whole parameters, and a stack of layers is many parameters.
_NORMED = {'adafactor', 'fromage', 'lamb', 'lars', 'novograd'}
_DECAY_INSIDE = {'lamb', 'lars'}  # the trust ratio is defined on the decayed update


class Ema(NamedTuple):
  average: Any  # shaped like the parameters, float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """Every knob of the optimizer; a wrong one is a UserError here, before any device work."""

  name: str = 'adamw'  # any optimizer of optax or optax.contrib, by its function's name
  lr: float = 1e-3  # peak learning rate
  schedule: str = 'cosine'  # constant | linear | cosine | rsqrt | wsd (warmup-stable-decay)
  warmup_steps: int = 0  # linear, from lr / warmup_steps at the first update
  final_lr: float = 0.0  # as a fraction of the peak, reached at the last step (linear, cosine, wsd)
  decay_fraction: float = 0.2  # wsd: the share of the run that decays
  weight_decay: float = 0.0  # decoupled; on matrices only, decided from axis names
  clip: float = 0.0  # global norm; 0 is off
  ema: float = 0.0  # decay of an exponential moving average of the parameters; 0 is off
  b1: float | None = None  # None: the optimizer's own default, here and below
  b2: float | None = None
  eps: float | None = None
  momentum: float | None = None
  args: dict = dataclasses.field(default_factory=dict)  # anything else the optax function takes

  def __post_init__(self):
    for key, limit in _LIMITS.items():
      value, kind = getattr(self, key), int if key == 'warmup_steps' else int | float
      good = isinstance(value, kind) and not isinstance(value, bool) and 0 <= value < limit
      if not good and not (value is None and key in _OPTIONAL):
        noun = 'an integer' if kind is int else 'a number'
        raise UserError(f'optimizer.{key} must be {noun} from 0 to below {limit}, not {value!r}')
    known = _optimizers()
    for key, value, options in (('schedule', self.schedule, SCHEDULES), ('name', self.name, known)):
      if value not in options:
        raise UserError(f'unknown optimizer.{key} "{value}"{did_you_mean(value, options)}')
    for key, default, schedules in (
      ('final_lr', 0.0, ('linear', 'cosine', 'wsd')),
      ('decay_fraction', 0.2, ('wsd',)),
    ):
      if getattr(self, key) != default and self.schedule not in schedules:
        raise UserError(f'optimizer.{key} is read by nothing with the {self.schedule} schedule')
    arguments = inspect.signature(known[self.name]).parameters
    free = set(arguments) - _OURS
    for key in self._given():
      if key not in free:
        raise UserError(f'optimizer "{self.name}" takes no {key} here{did_you_mean(key, free)}')
    if self.weight_decay and arguments['learning_rate'].default == 1.0:
      raise UserError(f'"{self.name}" finds its own step size, so weight_decay must be 0')

  def _given(self) -> dict[str, Any]:
    return {k: getattr(self, k) for k in _OPTIONAL if getattr(self, k) is not None} | self.args

  def schedule_fn(self, steps: int, peak: jax.Array | None = None) -> optax.Schedule:
    """The learning rate (float32) as a function of the number of updates already made.

    `peak`, which may be traced, stands in place of lr, here and in `transform`.
    With n = count + 1, W = warmup_steps, S = steps, f = final_lr and, for a decay that starts after
    update D, the share that is left r = 1 - clip((n - D) / (S - D), 0, 1), it is

      lr * min(1, n / W) * {
        constant  1
        linear    f + (1 - f) r                            D = W
        cosine    f + (1 - f) (1 - cos(pi r)) / 2          D = W, Loshchilov & Hutter 1608.03983
        rsqrt     sqrt(W / max(n, W))                      Vaswani et al. 1706.03762
        wsd       f + (1 - f) r                            D = S - decay_fraction * S, Hu 2404.06395
      }

    so update W is made at lr, and S, the last, at lr * f. UserError where warm-up leaves no room.
    """
    kind, warmup, start = self.schedule, max(self.warmup_steps, 1), self.warmup_steps
    if kind == 'wsd':
      start = steps - max(1, round(self.decay_fraction * steps))
    if kind != 'constant' and not self.warmup_steps <= start < steps:
      raise UserError(
        f'optimizer.warmup_steps = {self.warmup_steps} of {steps} steps leave the {kind} schedule '
        'no room to decay'
      )

    def schedule(count):
      n = jnp.asarray(count, jnp.float32) + 1
      factor = jnp.minimum(1, n / warmup)
      if kind == 'rsqrt':
        factor *= jnp.sqrt(warmup / jnp.maximum(n, warmup))
      elif kind != 'constant':
        left = 1 - jnp.clip((n - start) / (steps - start), 0, 1)
        left = (1 - jnp.cos(jnp.pi * left)) / 2 if kind == 'cosine' else left
        factor *= self.final_lr + (1 - self.final_lr) * left
      return (self.lr if peak is None else peak) * factor

    return schedule

  def transform(
    self, axes: Any, steps: int, peak: jax.Array | None = None
  ) -> optax.GradientTransformation:
    """Clipping, the optimizer, weight decay and the moving average, in this order.

    `axes` is a pytree like the parameters whose leaves are tuples of logical axis names. A matrix
    has 'embed' and another axis besides 'layers'; only matrices decay. Decay is AdamW's for all
    (p -= lr * weight_decay * p, arXiv:1711.05101) and optax's own is off, but LAMB and LARS decay
    inside their trust ratio. Norms that scale a step (LAMB, Adafactor) are those of single layers.
    Muon (Jordan 2024) gets the hidden matrices and Adam the rest, args['adam_learning_rate'] being
    the peak of the same schedule there. `update` needs the parameters. UserError as `schedule_fn`.
    """
    optimizer, given = _optimizers()[self.name], self._given()
    unit = dataclasses.replace(self, lr=1.0).schedule_fn(steps)
    decayed = _map(_is_matrix, axes)
    ours = {'learning_rate': self.schedule_fn(steps, peak), 'weight_decay': 0.0}
    peak = adam_peak = self.lr if peak is None else peak
    if self.name in _DECAY_INSIDE:
      ours |= {'weight_decay': self.weight_decay, 'mask': decayed, 'weight_decay_mask': decayed}
    if self.name == 'muon':
      adam_peak = given.pop('adam_learning_rate', peak)
      ours['adam_learning_rate'] = lambda count: adam_peak * unit(count)
      ours['muon_weight_dimension_numbers'] = _map(_muon_numbers, axes)
    taken = inspect.signature(optimizer).parameters
    update = optimizer(**{key: value for key, value in ours.items() if key in taken}, **given)

    chain = [optax.clip_by_global_norm(self.clip)] if self.clip else []
    chain.append(_per_layer(update, axes) if self.name in _NORMED else update)
    if self.weight_decay and self.name not in _DECAY_INSIDE:
      peaks = _map(lambda names: peak if _muon_numbers(names) else adam_peak, axes)
      rates = jax.tree.map(lambda lr, yes: lr * self.weight_decay * yes, peaks, decayed)
      chain.append(_decay(unit, rates))
    chain += [_moving_average(self.ema)] if self.ema else []
    return optax.chain(*chain)


def averaged(opt_state: Any) -> Any | None:
  """The moving average of the parameters (float32) in an optimizer state; None where it is off."""
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, Ema))
  return next((node.average for node in nodes if isinstance(node, Ema)), None)


def shardings(opt_state: Any, params: Any, of_params: Any, others: Any) -> Any:
  """The shardings of an optimizer state (or its shapes): what it keeps for a parameter in the same
  shape lies where the parameter lies, and all else as `others`."""
  known = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(of_params), strict=True)
  known = {(path, param.shape): place for (path, param), place in known}

  def find(path, kept):
    ends = ((path[start:], kept.shape) for start in range(len(path)))
    return next((known[end] for end in ends if end in known), others)

  return jax.tree.map_with_path(find, opt_state)


def _optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
  functions = dict(inspect.getmembers(optax, inspect.isfunction))
  functions |= inspect.getmembers(optax.contrib, inspect.isfunction)
  return {
    name: function
    for name, function in functions.items()
    if name not in _UNUSABLE and not name.startswith(('_', 'scale_by_'))
    if 'learning_rate' in inspect.signature(function).parameters
  }


def _map(function: Callable[[tuple], Any], axes: Any) -> Any:
  return jax.tree.map(function, axes, is_leaf=lambda node: isinstance(node, tuple))


def _is_matrix(names: tuple) -> bool:
  return 'embed' in names and sum(name != 'layers' for name in names) > 1


def _muon_numbers(names: tuple) -> optax.contrib.MuonDimensionNumbers | None:
  """The input and the output dimensions of a hidden matrix; None is left to Adam."""
  if not _is_matrix(names) or {'vocab', 'positions', 'types'} & set(names):
    return None
  dims = [dim for dim, name in enumerate(names) if name != 'layers']
  split = 1 if names[dims[0]] == 'embed' else len(dims) - 1
  return optax.contrib.MuonDimensionNumbers(tuple(dims[:split]), tuple(dims[split:]))


def _decay(schedule: optax.Schedule, rates: Any) -> optax.GradientTransformation:
  """Adds -schedule(count) * rate * parameter to each update; a rate of 0 adds nothing."""
  scheduled = optax.scale_by_schedule(schedule)

  def update(updates, state, params):
    decay = jax.tree.map(lambda rate, p: -rate * p, rates, params)
    decay, state = scheduled.update(decay, state)
    return jax.tree.map(jnp.add, updates, decay), state

  return optax.GradientTransformation(scheduled.init, update)


def _per_layer(tx: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
  """`tx` on every layer of a stacked parameter by itself; stacks may differ in height."""
  stacked, structure = jax.tree.flatten(_map(lambda names: names[:1] == ('layers',), axes))
  each = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
  parts = [optax.masked(tx, structure.unflatten([not is_stacked for is_stacked in stacked]))]
  for i in [i for i, is_stacked in enumerate(stacked) if is_stacked]:
    parts.append(optax.masked(each, structure.unflatten([i == j for j in range(len(stacked))])))
  return optax.chain(*parts)


def _moving_average(decay: float) -> optax.GradientTransformation:
  """Follows the updated parameters; it starts at the initial ones, so there is no bias."""

  def init(params):
    return Ema(jax.tree.map(lambda p: p.astype(jnp.float32), params))

  def update(updates, state, params):
    new = init(optax.apply_updates(params, updates))
    return updates, jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state, new)

  return optax.GradientTransformation(init, update)
