"""Attention without the square of logits: kernels that others wrote, made to run on shards.

Each takes q_BLNH, k_BSGH, v_BSGH and the structure of the mask, and returns y_BLNH; what a padded
query gets means nothing.  B batch, L query length, S key length, N query heads, G key-value heads,
H head.  `interpret` runs a Pallas kernel anywhere, slowly.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lmjax.errors import UserError
from lmjax.models import products, shards

QUERY, KEY = ('batch', 'length', 'heads', 'kv'), ('batch', None, 'heads', 'kv')


def _on_shards(kernel: Callable, arrays: tuple, specs: tuple) -> jax.Array:
  """kernel(*arrays) on every device's part: the compiler cannot cut a kernel up by itself."""
  if jax.sharding.get_abstract_mesh().size <= 1:
    return kernel(*arrays)
  specs = specs[: len(arrays)]
  return jax.shard_map(kernel, in_specs=specs, out_specs=shards.spec(*QUERY), check_vma=False)(
    *arrays
  )


def cudnn(
  q_BLNH: jax.Array,
  k_BSGH: jax.Array,
  v_BSGH: jax.Array,
  causal: bool,
  window: int,
  lengths_B: jax.Array | None,
) -> jax.Array:
  """NVIDIA's, through jax.nn (Dao, 2023)."""

  def kernel(q, k, v, *lengths):
    sizes = dict(zip(('query_seq_lengths', 'key_value_seq_lengths'), lengths * 2, strict=False))
    left = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(
      q, k, v, is_causal=causal, local_window_size=left, implementation='cudnn', **sizes
    )

  lengths = () if lengths_B is None else (lengths_B,)
  specs = (shards.spec(*QUERY), shards.spec(*KEY), shards.spec(*KEY), shards.spec('batch'))
  return _on_shards(kernel, (q_BLNH, k_BSGH, v_BSGH, *lengths), specs)


def triton(
  q_BLNH: jax.Array,
  k_BSGH: jax.Array,
  v_BSGH: jax.Array,
  causal: bool,
  segments_BL: jax.Array | None,
  interpret: bool = False,
) -> jax.Array:
  """JAX's Pallas kernel for GPUs, which knows documents."""
  from jax.experimental.pallas.ops.gpu.attention import mha  # takes half a second to import

  def kernel(q, k, v, *segments):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    return mha(q, k, v, segments[0] if segments else None, scale, causal, interpret=interpret)

  segments = () if segments_BL is None else (segments_BL,)
  specs = (shards.spec(*QUERY), shards.spec(*KEY), shards.spec(*KEY), shards.spec('batch', None))
  return _on_shards(kernel, (q_BLNH, k_BSGH, v_BSGH, *segments), specs)


def splash(
  q_BLNH: jax.Array,
  k_BSGH: jax.Array,
  v_BSGH: jax.Array,
  causal: bool,
  window: int,
  segments_BL: jax.Array | None,
  interpret: bool = False,
) -> jax.Array:
  """JAX's Pallas kernel for TPUs, which skips what the causal mask or the window hides.

  Where the length is sharded, the keys and values are whole on each device; and, with a causal
  mask, each has as much to skip as the others, since it works on an early and a late piece.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  (_, length, heads, head_dim), ways = q_BLNH.shape, shards.ways('length')
  keys, parts = k_BSGH.shape[1], ways
  if causal or 0 < window < keys:
    left, right = (window - 1, window - 1) if window else (None, None)
    seen = masks.LocalMask((length, keys), (left, 0 if causal else right), 0)
  else:  # alike for every query
    seen, parts = masks.FullMask((length // ways, keys)), 1
  deal = causal and ways > 1
  if deal:
    seen.q_sequence = _dealt(length, ways)
  # As large as divides: 512 keeps the kernel's matrix products busy and its blocks in memory.
  block = next(n for n in (512, 256, 128) if length // ways % n == 0)
  # The last dimension in memory is filled up to 128.
  layout = kernels.QKVLayout['SEQ_MINOR' if head_dim % 128 else 'HEAD_DIM_MINOR']
  layouts = dict.fromkeys(('q_layout', 'k_layout', 'v_layout'), layout)
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([seen] * heads),
    block_sizes=kernels.BlockSizes(*(block,) * 6, use_fused_bwd_kernel=True, **layouts),
    head_shards=shards.ways('heads'),
    q_seq_shards=parts,
    residual_checkpoint_name='attended',
    interpret=interpret,
  )

  def run(kernel, q, k, v, *segments):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q = _exchange(q, ways) if deal else q
    ids = kernels.SegmentIds(*segments) if segments else None
    y = jax.vmap(kernel, (0, 0, 0, 0 if segments else None))(q * head_dim**-0.5, k, v, ids)
    y = _exchange(y, ways, back=True) if deal else y
    return y.swapaxes(1, 2)

  segments = ()
  if segments_BL is not None:
    segments = (segments_BL[:, seen.q_sequence] if deal else segments_BL, segments_BL)
  names = (QUERY, KEY, KEY, ('batch', 'length'), ('batch', None))
  specs = tuple(shards.spec(*axes) for axes in names)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size > 1:
    place = NamedSharding(mesh, shards.spec('heads', 'length' if parts > 1 else None))
    specs = (kernel.manual_sharding_spec(place), *specs)
  return _on_shards(run, (kernel, q_BLNH, k_BSGH, v_BSGH, *segments), specs)


def _dealt(length: int, ways: int) -> np.ndarray:
  """The places of the queries when shard d of n works on the pieces d and 2n - 1 - d of 2n."""
  pieces = np.arange(length, dtype=np.int32).reshape(2 * ways, -1)
  pairs = [(d, 2 * ways - 1 - d)[:: 1 if d % 2 == 0 else -1] for d in range(ways)]
  return pieces[np.ravel(pairs)].ravel()


def _exchange(x_BNLH: jax.Array, ways: int, back: bool = False) -> jax.Array:
  """Deals the pieces out: each shard has an even one and an odd one, before and after."""
  (axis,) = shards.spec('length')

  def owner(piece):
    return min(piece, 2 * ways - 1 - piece)

  def send(piece_BNCH, first):
    routes = [(d, owner(2 * d + first)) for d in range(ways)]
    return jax.lax.ppermute(piece_BNCH, axis, [r[::-1] for r in routes] if back else routes)

  even_BNCH, odd_BNCH = jnp.split(x_BNLH, 2, axis=2)
  return jnp.concatenate([send(even_BNCH, 0), send(odd_BNCH, 1)], axis=2)


# ---------------------------------------------------------------------------- which, and why


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What a kernel can do; the reference can do everything."""

  platform: str
  masks: tuple[str, ...]
  dtypes: tuple[str, ...]
  head_multiple: int
  head_most: int
  length_multiple: int
  sharded_length: bool  # whether it works on a part of the queries
  call: Callable


KERNELS = {
  'splash': Kernel(
    platform='tpu',
    masks=('causal', 'sliding window', 'bidirectional window', 'segments', 'padding'),
    dtypes=('float32', 'bfloat16'),
    head_multiple=1,
    head_most=256,
    length_multiple=128,
    sharded_length=True,
    call=lambda q, k, v, m: splash(q, k, v, m.causal, m.window, m.segments(q.shape[1])),
  ),
  'cudnn': Kernel(
    platform='gpu',
    masks=('causal', 'sliding window', 'padding'),
    dtypes=('bfloat16', 'float16'),
    head_multiple=8,
    head_most=128,  # 256 on Hopper and later
    length_multiple=2,  # cuDNN itself takes odd ones; jax.nn's gradient does not
    sharded_length=False,
    call=lambda q, k, v, m: cudnn(q, k, v, m.causal, m.window, m.lengths_B),
  ),
  'triton': Kernel(
    platform='gpu',
    masks=('causal', 'segments', 'padding'),
    dtypes=('bfloat16', 'float16'),
    head_multiple=1,
    head_most=128,
    length_multiple=128,
    sharded_length=False,
    call=lambda q, k, v, m: triton(q, k, v, m.causal, m.segments(q.shape[1])),
  ),
}
BACKENDS = ('auto', 'reference', *KERNELS)


def choose(backend: str, **asked: Any) -> tuple[str, str]:
  """(what computes it, why); `asked` are arguments of `lacks`."""
  platform = _platform()
  if backend == 'auto':
    there = [name for name, kernel in KERNELS.items() if kernel.platform == platform]
    why = {name: lacks(name, platform=platform, **asked) for name in there}
    for name in there:
      if not why[name]:
        return name, '; '.join(filter(None, why.values())) or f'of {platform}'
    return 'reference', '; '.join(why.values()) or f'no kernel runs on {platform}'
  if backend != 'reference' and (why := lacks(backend, platform=platform, **asked)):
    raise UserError(f'model.attention = "{backend}" cannot be: {why}')
  return backend, 'as model.attention says'


def lacks(
  name: str,
  *,
  platform: str | None = None,
  masks: tuple[str, ...] = (),
  dtype: str | None = None,
  head_dim: int | None = None,
  length: int | None = None,
  bias: bool = False,
  dropout: bool = False,
  cache: bool = False,
) -> str:
  """Why a kernel cannot do what is asked of it; '' where it can.  None: not known yet."""
  kernel = KERNELS[name]
  missing = [mask for mask in masks if mask not in kernel.masks]
  ways = shards.ways('length')
  multiple = kernel.length_multiple * ways
  reasons = {
    f'runs on {kernel.platform}, not on {platform}': platform not in (None, kernel.platform),
    f'has no mask for {" or ".join(missing)}': missing,
    f'does not compute in {dtype}': dtype not in (None, *kernel.dtypes),
    f'takes heads of up to {kernel.head_most} dims, not {head_dim}': (head_dim or 0)
    > kernel.head_most,
    f'takes heads of a multiple of {kernel.head_multiple} dims, not {head_dim}': (head_dim or 0)
    % kernel.head_multiple,
    'adds nothing to the logits, as these positions do': bias,
    'has no dropout of attention weights': dropout,
    'has no cache': cache,
    'does not shard the length': ways > 1 and not kernel.sharded_length,
    f'takes lengths of a multiple of {multiple}, not {length}': (length or 0) % multiple,
  }
  return next((f'{name} {reason}' for reason, holds in reasons.items() if holds), '')


def _platform() -> str:
  """As the kernels mean it: a GPU is NVIDIA's, and no older than Ampere."""
  platform, capability = products.platform(), getattr(jax.devices()[0], 'compute_capability', '8.0')
  fit = capability[0].isdigit() and float(capability) >= 8
  return platform if platform != 'gpu' or fit else f'a GPU of capability {capability}'
