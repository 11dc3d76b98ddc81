"""Matrix products, in the form that the compiler for the devices at hand does best."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn


def platform() -> str:
  """Of the devices that the program is for, which need not be those of this machine."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if not device:
    return jax.default_backend()
  kind = device.device_kind  # jax 0.10.0 knows no more of it
  return 'cpu' if kind == 'cpu' else 'tpu' if kind.startswith('TPU') else 'gpu'


def product(x: jax.Array, kernel: jax.Array, n: int, dtype: jnp.dtype | None = None) -> jax.Array:
  """Sums over the last n dimensions of x and the first n of the kernel."""
  sharded = any(name in ('length', 'residual_length') for name, _ in nn.get_logical_axis_rules())
  if sharded or (dtype is None and platform() == 'tpu'):
    # Dimensions that are merged cannot lie apart in memory, as attention's kernels want them: their
    # copies were a quarter of the memory traffic of a step (GPT-2 XL on v5e:4x4: 686, now 515 GiB).
    # And a length that is sharded would be gathered.
    return jnp.tensordot(x, kernel, n, preferred_element_type=dtype)
  # As a product of two matrices: the gradient of the kernel of a product over three dimensions
  # takes XLA's CPU compiler twice the time.
  inner = math.prod(kernel.shape[:n])
  y = matmul(x.reshape(-1, inner), kernel.reshape(inner, -1), dtype)
  return y.reshape(*x.shape[: x.ndim - n], *kernel.shape[n:])


def matmul(x: jax.Array, y: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
  """x @ y in their dtype, or rounded to another; the gradients' products are in their dtype."""
  dtype = dtype or x.dtype
  if x.dtype == dtype and not (x.dtype == jnp.bfloat16 and platform() == 'cpu'):
    return jnp.matmul(x, y)
  return _wide(x, y, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wide(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """With float32 results: only so does XLA use the matrix unit of a CPU (AMX), 7 times as fast.

  Where they are not asked for, they would be wrong elsewhere: partial sums would travel between
  devices in float32.
  """
  return jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(dtype)


def _forward(x, y, dtype):
  return _wide(x, y, dtype), (x, y)


def _backward(dtype, operands, d):
  (x, y), d = operands, d.astype(operands[0].dtype)
  return matmul(d, y.mT), matmul(x.mT, d)


_wide.defvjp(_forward, _backward)
