"""Products are what they say, in the form that a CPU's matrix unit can use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models import products


@pytest.mark.parametrize('shape', [(8, 4), (2, 3, 8, 4)])
def test_bfloat16_products_on_a_cpu_have_float32_results_inside(shape):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], shape, jnp.bfloat16)
  y = jax.random.normal(keys[1], (*shape[:-2], 4, 6), jnp.bfloat16)
  d = jax.random.normal(keys[2], (*shape[:-1], 6), jnp.bfloat16)

  def pull(matmul, *args):
    out, back = jax.vjp(matmul, *args[:2])
    return out, *back(args[2])

  program = jax.jit(pull, static_argnums=0).trace(products.matmul, x, y, d).lower().as_text()
  results = [line.split('->')[-1] for line in program.splitlines() if 'dot_general' in line]
  assert len(results) == 3
  assert all('xf32' in result for result in results)
  exact = pull(jnp.matmul, *(a.astype(jnp.float32) for a in (x, y, d)))
  for got, expected in zip(pull(products.matmul, x, y, d), exact, strict=True):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize('n', [1, 2])
def test_product_sums_over_the_last_and_the_first_dimensions(n):
  rng = np.random.default_rng(0)
  x, kernel = rng.integers(-9, 9, (2, 3, 4, 5)), rng.integers(-9, 9, (4, 5, 6)[2 - n :])
  np.testing.assert_array_equal(products.product(x, kernel, n), np.tensordot(x, kernel, n))
