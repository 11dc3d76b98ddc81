"""Continues a prompt with a trained causal model: a compiled loop over a cache of keys and values.

B prompts, L length, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn

from lmjax import command, record, sharding
from lmjax.errors import UserError
from lmjax.evaluate import restore_params
from lmjax.experiment import Experiment, keep_programs, open_run, run_path


def choose(
  logits_BV: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
  """Token ids int32[B]: the likeliest at temperature 0, else a draw from the likeliest.

  top_k > 0 keeps so many tokens; top_p < 1 keeps the fewest whose probabilities add up to at least
  top_p (Holtzman et al., 2020).
  """
  if temperature == 0:
    return logits_BV.argmax(axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / temperature
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  if top_k:
    sorted_BV = jnp.where(jnp.arange(sorted_BV.shape[-1])[None] < top_k, sorted_BV, -jnp.inf)
  probabilities_BV = jax.nn.softmax(sorted_BV)
  before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
  kept_BV = (before_BV < top_p) & (sorted_BV > -jnp.inf)
  threshold_B1 = jnp.where(kept_BV, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
  kept_BV = jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
  return jax.random.categorical(key, kept_BV).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=('model', 'new', 'temperature', 'top_k', 'top_p'))
def continue_tokens(
  model: nn.Module,
  params: Any,
  prompt_BL: jax.Array,
  key: jax.Array,
  new: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> jax.Array:
  """int32[B, new]: what follows the prompts, which are all of one length."""
  b, length = prompt_BL.shape
  pick = functools.partial(choose, temperature=temperature, top_k=top_k, top_p=top_p)

  def decode(cache, tokens_BL, positions_BL):
    variables = {'params': params, **cache}
    return model.apply(
      variables,
      tokens_BL,
      positions_BL=positions_BL,
      cache_length=length + new,
      method='logits',
      mutable=['cache'],
    )

  def step(carry, place):
    cache, token_B = carry
    positions_BL = jnp.full((b, 1), place)
    logits_BLV, cache = decode(cache, token_B[:, None], positions_BL)
    next_B = pick(logits_BLV[:, -1], jax.random.fold_in(key, place))
    return (cache, next_B), next_B

  positions_BL = jnp.broadcast_to(jnp.arange(length)[None], (b, length))
  logits_BLV, cache = decode({}, prompt_BL, positions_BL)
  first_B = pick(logits_BLV[:, -1], jax.random.fold_in(key, length - 1))
  _, rest_LB = jax.lax.scan(step, (cache, first_B), length + jnp.arange(new - 1))
  return jnp.concatenate([first_B[None], rest_LB]).T


def continue_text(
  parts: Experiment,
  params: Any,
  prompt: str,
  max_tokens: int | None = None,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
) -> str:
  """The prompt and what the model makes of it, up to the end of the text.

  By default as much is added as there are positions for, and at most 128 tokens.

  Raises:
    UserError: a model that is not causal, numbers out of range, more tokens than it has positions.
  """
  check_causal(parts)
  t = parts.tokenizer
  ids, limit = encode_prompt(parts, prompt)
  max_tokens = max(1, min(128, limit - len(ids))) if max_tokens is None else max_tokens
  _check(max_tokens, temperature, top_k, top_p)
  if len(ids) + max_tokens > limit:
    raise UserError(
      f'the prompt of {len(ids)} tokens and max_tokens = {max_tokens} exceed the {limit} positions '
      'that the model has learned'
    )
  sampling = dict(temperature=temperature, top_k=min(top_k, t.vocab_size), top_p=top_p)
  prompt_BL = np.array([ids], np.int32)
  new_BL = continue_tokens(
    parts.model, params, prompt_BL, jax.random.key(seed), max_tokens, **sampling
  )
  new = jax.device_get(new_BL)[0].tolist()
  new = new[: new.index(t.eos)] if t.eos in new else new
  return t.decode(t.encode(prompt) + new)


def encode_prompt(parts: Experiment, prompt: str) -> tuple[list[int], int]:
  """(ids, the most tokens that the model has positions for); UserError if none is left."""
  t, core = parts.tokenizer, parts.core
  # Where its tokenizer says nothing, the end of a text is what comes before every text.
  ids = [*(t.opening or [t.eos]), *t.encode(prompt)]
  limit = core.max_length if core.positions == 'learned' else 1 << 30
  if len(ids) >= limit:
    raise UserError(f'the prompt of {len(ids)} tokens fills the {limit} positions of the model')
  return ids, limit


def check_causal(parts: Experiment) -> None:
  """Raises a UserError where the experiment does not train a model that continues texts."""
  if not parts.objective.causal:
    name = parts.config['objective']['name']
    raise UserError(
      f'only a causal model continues a prompt, be it of log.sample or yours: "{name}" trains none'
    )


def _check(max_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
  if max_tokens < 1:
    raise UserError(f'max_tokens = {max_tokens} must be at least 1')
  if not temperature >= 0:
    raise UserError(f'temperature = {temperature} must be at least 0')
  if top_k < 0:
    raise UserError(f'top_k = {top_k} must be at least 0')
  if not 0 < top_p <= 1:
    raise UserError(f'top_p = {top_p} must be above 0 and at most 1')


def main() -> None:
  f = flags.FLAGS
  if not f.workdir:
    raise UserError('name the run with --workdir DIR')
  sampling = ('max_tokens', 'temperature', 'top_k', 'top_p', 'seed')
  asked = {name: f[name].value for name in ('workdir', 'step', 'prompt', *sampling)}
  with command.joined(lambda: record.flatten({**record.software(), **asked})):
    parts = open_run(f.workdir)
    keep_programs(parts.config, run_path(f.workdir))
    check_causal(parts)
    mesh = sharding.mesh_of_run(parts.config, parts.boxed_shapes)
    with jax.set_mesh(mesh), sharding.logical_axes(parts.config['sharding']['strategy']):
      _, params = restore_params(parts, f.workdir, mesh, f.step)
      print(continue_text(parts, params, f.prompt, **{name: asked[name] for name in sampling}))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'The directory of the run.')
  flags.DEFINE_integer('step', None, 'The checkpoint; the newest by default.')
  flags.DEFINE_string('prompt', '', 'The text to continue.')
  flags.DEFINE_integer('max_tokens', None, 'How many tokens to add at most; by default 128.')
  flags.DEFINE_float('temperature', 1.0, 'Spread of the draw; 0 takes the likeliest token.')
  flags.DEFINE_integer('top_k', 0, 'Draw from so many likeliest tokens; 0: from all.')
  flags.DEFINE_float('top_p', 1.0, 'Draw from the likeliest that make up this probability.')
  flags.DEFINE_integer('seed', 0, 'Of the draw.')
  command.define_process_flags()
  command.run(main)
