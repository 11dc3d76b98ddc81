"""Oracles of what is learned: first losses, gradients, and that the step is what it should be."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax import config as config_lib
from lmjax import guard, sharding
from lmjax.check.seeing import change, kept
from lmjax.check.twin import Batch, Finding, Twin, devices, quickly, there
from lmjax.errors import UserError
from lmjax.state import TrainState, init_state
from lmjax.step import lower

UNSEEN = 'key.bias'  # shifts all logits of a query alike, which a softmax does not see
STEP = 0.005  # along a gradient: curvature adds to the slope less than 1 %, rounding 1e-4
STEPS, FEW = 75, 3  # in which so many rows are to be learned by heart
Stepped = tuple[Any, list[float]]  # parameters, and the loss of each step
STEADY = {'schedule': 'constant', 'warmup_steps': 0, 'final_lr': 0.0, 'decay_fraction': 0.2}
SGD = config_lib.base().optimizer.to_dict() | STEADY | {'name': 'sgd', 'lr': 0.1}


def first_loss(twin: Twin) -> Finding:
  """A model that has seen nothing is as good as one that knows nothing."""
  terms, _ = twin.totals(twin.params, twin.batch)
  expected = twin.objective.ignorant(twin.vocab_size)
  found = {key: mean.compute() for key, mean in terms.items()}
  # Of few targets, such as a label for each row, the mean is that of chance.
  limits = {key: 0.05 * x + 0.5 / math.sqrt(terms[key].weight) for key, x in expected.items()}
  near = all(abs(found[key] - x) <= limits[key] for key, x in expected.items())
  saw = (f'{key} {found[key]:.3f} of {x:.3f} nats' for key, x in expected.items())
  return Finding(
    near,
    ', '.join(saw),
    'More: the model begins with opinions: weights are too large (model.initializer).  Less: it '
    'sees what it is to predict, or terms are divided by too much.',
  )


def gradients(twin: Twin) -> Finding:
  """Every parameter, in every layer, gets a gradient, and a finite one."""
  _, grads = twin.slope(twin.wide, twin.batch)
  names = sharding.axis_names(twin.boxed_shapes)
  axes = jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple))
  bad = []
  for (name, grad), of in zip(_named(grads).items(), axes, strict=True):
    layers = np.reshape(grad, (len(grad) if 'layers' in of else 1, -1))
    sizes = np.abs(layers).max(axis=1)
    for n in np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0))):
      if not name.endswith(UNSEEN):
        bad.append(f'{name} of layer {n}' if 'layers' in of else name)
  return Finding(
    not bad,
    f'none, or no finite one: {", ".join(bad)}' if bad else f'{len(axes)} arrays, layer by layer',
    'These would never be trained: they are not used, or what uses them is cut off (stop_gradient, '
    'an integer, a module that is called but whose result is dropped).',
  )


def slope(twin: Twin) -> Finding:
  """The gradient of each parameter is the slope of the loss along it."""
  _, grads = twin.slope(twin.wide, twin.batch)
  (params, form), wrong = jax.tree.flatten(twin.wide), []

  def loss(n, direction):
    moved = [x + direction if i == n else x for i, x in enumerate(params)]
    terms, _ = twin.totals(jax.tree.unflatten(form, moved), twin.batch)
    return sum(term.compute() for term in terms.values())

  norms = {name: float(np.linalg.norm(grad)) for name, grad in _named(grads).items()}
  for n, (name, norm) in enumerate(norms.items()):
    if norm < STEP:
      continue
    step = np.float32(STEP / norm) * jax.tree.leaves(grads)[n]
    found = (loss(n, step) - loss(n, -step)) / (2 * STEP)
    if not abs(found - norm) <= 0.03 * norm + 2e-4:
      wrong.append(f'{name} {norm:.4g}, and the loss rises by {found:.4g}')
  seen = f'{sum(norm >= STEP for norm in norms.values())} arrays whose gradient is no rounding'
  return Finding(
    not wrong,
    f'norm of the gradient of {"; ".join(wrong)}' if wrong else seen,
    'The gradient is that of something else: look at custom derivatives (custom_vjp, linear_call) '
    'and stop_gradient in what the model is made of.',
  )


def by_heart(twin: Twin) -> Finding:
  """Some rows can be learned by heart."""
  floors = {key: 0.0 for key in ('label_smoothing', 'z_loss') if twin.config['objective'].get(key)}
  twin, transform = twin.but(objective=floors) if floors else twin, optax.adam(1e-2)
  few = kept(twin.batch, np.arange(len(twin.batch['tokens']))[:, None] < FEW)
  if twin.tokenizer.special[few['tokens'][:FEW]].all():
    return Finding(None, 'all tokens are hidden, so that nobody could tell rows apart')

  @functools.partial(jax.jit, compiler_options=quickly())
  def update(params, grads, state):
    updates, state = transform.update(grads, state)
    return optax.apply_updates(params, updates), state

  with twin.here():
    params, state, losses = twin.wide, transform.init(twin.wide), []
    for _ in range(STEPS):
      loss, grads = twin.slope(params, few)
      losses.append(float(loss))
      params, state = update(params, grads, state)
  ignorant = sum(twin.objective.ignorant(twin.vocab_size).values())
  return Finding(
    losses[-1] < 0.4 * ignorant,
    f'in {STEPS} steps on {FEW} rows the loss goes from {losses[0]:.3f} to {losses[-1]:.3f}',
    'It does not learn what it is shown again and again: the targets are not of these tokens, '
    'differ for equal inputs, or parts of the model do not work.',
  )


def micro_batches(twin: Twin) -> Finding:
  """The step of a batch in parts, whose weights differ, goes along the gradient of the whole."""
  exact = twin.config['deterministic_sum']  # then there are virtual shards in place of them
  apart = _apart(twin, _stepped(_plain(twin, micro_batches=1 if exact else 4)))
  return Finding(
    apart <= 1e-4,
    f'a step in {"virtual shards" if exact else "4 micro-batches"} differs from the gradient by '
    f'{apart:.1e} of its largest number',
    'Means of parts are averaged, or parts are weighted by their own weights: in the model a term '
    'is a Mean of sums over the batch that it is given, and nothing is divided.',
  )


def sharded(twin: Twin) -> Finding:
  """So does the step of several devices under the strategy."""
  strategy, there_are = twin.config['sharding']['strategy'], devices()
  used = {axis for _, axes in sharding.rules(strategy) for axis in axes} - {'replica'}
  sizes = dict.fromkeys(sharding.MESH_AXES, 1)
  for axis in sorted(used, key=('model', 'sequence', 'data').index):
    sizes[axis] = 2 if math.prod(sizes.values()) * 2 <= min(len(there_are), 4) else 1
  count = math.prod(sizes.values())
  if count == 1:
    return Finding(None, 'there is one device')
  mesh, plain = sharding.make_mesh(sizes, there_are[:count]), _plain(twin)
  try:
    sharding.check_batch(plain.config, mesh)
    sharding.param_shardings(plain.boxed_shapes, mesh, strategy)
  except UserError as e:
    return Finding(None, str(e))
  apart = _apart(twin, _stepped(plain, mesh))
  shape = ' x '.join(f'{axis} {size}' for axis, size in sizes.items() if size > 1)
  return Finding(
    apart <= 1e-4,
    f'under "{strategy}" on {shape} a step differs from the gradient by {apart:.1e} of its largest',
    'The model computes something on a shard as if it were all there is: look at shard_map and at '
    'constraints in what it is made of (models/shards.py).',
  )


def optimizer(twin: Twin) -> Finding:
  """In some steps of the experiment's own optimizer the loss falls and every parameter moves."""
  quiet = dict.fromkeys(_noises(twin), 0.0)
  parts = twin.but(model=quiet, optimizer=_steady(twin))
  before, (after, losses) = twin.params, _stepped(parts, params=twin.params, count=20)
  same = _named(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))
  still = [name for name, is_same in same.items() if is_same and not name.endswith(UNSEEN)]
  saw = f'in 20 steps on one batch the loss goes from {losses[0]:.4f} to {min(losses):.4f}'
  return Finding(
    min(losses) < losses[0] and not still,
    saw + (f'; never moved: {", ".join(still)}' if still else ''),
    'optimizer.lr is too large, or the optimizer (lmjax/optimizer.py) leaves parameters out, or '
    'goes the wrong way.',
  )


def decay(twin: Twin) -> Finding:
  """Weight decay shrinks matrices, and neither biases nor the scales of norms."""
  if not twin.config['optimizer']['weight_decay']:
    return Finding(None, 'there is none, as asked')

  def update(params, **more):
    transform = init_state(twin.but(optimizer=_steady(twin) | more), twin.mesh)[1]
    nothing = jax.tree.map(jnp.zeros_like, params)
    return transform.update(nothing, transform.init(params), params)[0]

  difference = lambda p: jax.tree.map(jnp.subtract, update(p), update(p, weight_decay=0.0))
  with twin.here():
    update_of = jax.device_get(jax.jit(difference, compiler_options=quickly())(twin.wide))
  decayed = [name for name, x in _named(update_of).items() if x.any()]
  wrong = sorted(name for name in decayed if name.endswith(('bias', 'scale')))
  return Finding(
    bool(decayed) and not wrong,
    f'{len(decayed)} arrays decay' + (f', among them {", ".join(wrong)}' if wrong else ''),
    'What decays is decided by the axis names that parameters are made with (lmjax/optimizer.py).',
  )


def noise(twin: Twin) -> Finding:
  """Every dropout is at work in training, drawn anew in every step, and none is in evaluation."""
  asked = [key for key in _noises(twin) if twin.config['model'][key]]
  if not asked:
    return Finding(None, 'there is no dropout, as asked')
  idle = [name for name, works in sorted(twin.dropouts(train=True)) if not works]
  noisy = [name for name, works in sorted(twin.dropouts(train=False)) if works]
  if idle or noisy:
    saw = f'do nothing in training: {", ".join(idle) or "none"}'
    saw += f'; at work in evaluation: {", ".join(noisy) or "none"}'
    return Finding(False, saw, 'These do not heed `train`: look at what is handed to nn.Dropout.')
  seen = {}
  for key in asked:
    alone = {other: 0.0 for other in asked if other != key}
    seen[key] = _stepped(twin.but(optimizer=SGD | {'lr': 0.0}, model=alone), count=3)[1]
  said = (f'{key} {", ".join(f"{x:.4f}" for x in losses)}' for key, losses in seen.items())
  return Finding(
    all(len(set(losses)) == 3 for losses in seen.values()),
    f'in three steps on one batch, with a learning rate of 0, the loss is with {"; ".join(said)}',
    'The key of the noise does not change with the step, or `train` does not reach the dropout.',
  )


def bfloat16(twin: Twin) -> Finding:
  """In bfloat16 loss and gradient are nearly those of float32."""
  loss, grads = twin.slope(twin.params, twin.batch)
  low_loss, low_grads = twin.but(model={'dtype': 'bfloat16'}).slope(twin.params, twin.batch)
  a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (grads, low_grads))
  apart = float(np.linalg.norm(a - b) / np.linalg.norm(a))
  return Finding(
    change(float(low_loss), float(loss)) < 1e-3 and apart < 0.1,
    f'loss differs by {change(float(low_loss), float(loss)):.1e}, gradient by {apart:.1e}',
    'Something that needs float32 is rounded: parameters, norms, the residual stream, long sums.',
  )


# ----------------------------------------------------------------------------------------- steps


def _named(tree: Any) -> dict[str, Any]:
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='.')
  return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _noises(twin: Twin) -> list[str]:
  return [key for key in twin.config['model'] if key.endswith('dropout')]


def _steady(twin: Twin) -> dict[str, Any]:
  """The experiment's optimizer without its schedule, at rates that are more than rounding."""
  asked = twin.config['optimizer']
  args = {key: value for key, value in asked['args'].items() if 'learning_rate' not in key}
  return STEADY | {'lr': max(asked['lr'], 1e-3), 'args': args}


def _plain(twin: Twin, **more: int) -> Twin:
  """Without noise, and with updates that are gradients."""
  return twin.but(model=dict.fromkeys(_noises(twin), 0.0), optimizer=SGD, **more)


def _stepped(
  parts: Twin, mesh: jax.sharding.Mesh | None = None, params: Any = None, count: int = 1
) -> Stepped:
  """After some steps of training on the batch, whose rows differ in weight."""
  mesh, params = mesh or parts.mesh, parts.wide if params is None else params
  strategy = parts.config['sharding']['strategy']
  with there(mesh, strategy):
    like, transform, _ = init_state(parts, mesh)
    step = lower(parts, mesh, like, transform).compile(quickly())
    key = jax.random.key(parts.config['seed'])
    zeros = jnp.zeros(guard.WINDOW)
    # By way of the host: what an optimizer keeps may be one array in several places.
    kept_by_it = jax.device_get(transform.init(params))
    state = TrainState(jnp.int32(0), params, kept_by_it, key, zeros)
    state = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, like)
    batch, losses = parts.place(_uneven(parts.batch), mesh), []
    for _ in range(count):
      state, numbers = step(state, batch)
      losses.append(float(numbers['guard']['loss']))
    return jax.device_get(state.params), losses


def _uneven(batch: Batch) -> Batch:
  """Row n keeps the weights of the first n + 1 parts of it."""
  rows, length = batch['tokens'].shape
  return kept(batch, np.arange(length)[None] * rows < length * np.arange(1, rows + 1)[:, None])


def _apart(twin: Twin, stepped: Stepped) -> float:
  """How far a step of SGD is from the gradient, of its largest number; or the loss, if further."""
  params, losses = stepped
  loss, grads = twin.slope(twin.wide, _uneven(twin.batch))
  apart = lambda x, y, grad: float(np.abs((y - x) / SGD['lr'] - grad).max())
  worst = np.max(jax.tree.leaves(jax.tree.map(apart, params, twin.wide, grads)))
  largest = max(float(np.abs(grad).max()) for grad in jax.tree.leaves(grads))
  return float(
    np.max([worst / largest, change(losses[0], float(loss))])
  )  # also of what is no number
