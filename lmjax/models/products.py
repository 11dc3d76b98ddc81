"""Matrix products, in the form that the compiler for the devices at hand does best."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn


def platform() -> str:
  """Of the devices that the program is for, which need not be those of this machine."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def product(x: jax.Array, kernel: jax.Array, n: int, dtype: jnp.dtype | None = None) -> jax.Array:
  """Sums over the last n dimensions of x and the first n of the kernel."""
  if any(name in ('length', 'residual_length') for name, _ in nn.get_logical_axis_rules()):
    return jnp.tensordot(x, kernel, n, preferred_element_type=dtype)  # merging would gather x
  # As a product of two matrices: the gradient of the kernel of a product over three dimensions
  # takes XLA's CPU compiler twice the time.
  inner = math.prod(kernel.shape[:n])
  y = matmul(x.reshape(-1, inner), kernel.reshape(inner, -1), dtype)
  return y.reshape(*x.shape[: x.ndim - n], *kernel.shape[n:])


def matmul(x: jax.Array, y: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
  """x @ y in their dtype, or another."""
  if x.dtype == jnp.bfloat16 and dtype is None and platform() == 'cpu':
    return _wide(x, y)
  return jnp.matmul(x, y, preferred_element_type=dtype)


@jax.custom_vjp
def _wide(x: jax.Array, y: jax.Array) -> jax.Array:
  """With float32 results: only so does XLA use the matrix unit of a CPU (AMX), 7 times as fast.

  Elsewhere it would be wrong: partial sums would travel between devices in float32.
  """
  return jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, y):
  return _wide(x, y), (x, y)


def _backward(operands, d):
  x, y = operands
  return _wide(d, y.mT), _wide(x.mT, d)


_wide.defvjp(_forward, _backward)
