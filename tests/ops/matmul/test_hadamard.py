"""Hadamard matrices by their definition, and the fast product against the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads

from effjax.core import errors
from effjax.ops import flops
from effjax.ops.matmul import hadamard

ORDERS = [n for n in range(1, 257) if hadamard.exists(n)]


def test_every_order_by_its_definition():
  for n in ORDERS:
    h = hadamard.hadamard_matrix(n).astype(np.int64)
    assert h.shape == (n, n) and set(np.unique(h)) <= {-1, 1}
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n, dtype=np.int64))


def test_orders_are_those_of_both_constructions():
  # Multiples of 4 up to 256 that need other constructions than Sylvester's and Paley's.
  missing = [92, 116, 156, 172, 184, 188, 232, 236]
  assert [n for n in ORDERS if n > 2] == [
    n for n in range(4, 257, 4) if n not in missing
  ]
  # Fields of prime powers: 27, 7^3, and Paley II over 25 and 49.
  for order in (28, 344, 52, 100):
    assert hadamard.exists(order)
  h = hadamard.hadamard_matrix(344).astype(np.int64)
  np.testing.assert_array_equal(h @ h.T, 344 * np.eye(344, dtype=np.int64))


def test_powers_of_two_are_sylvesters():
  for n in (1, 2, 4, 32, 64, 128, 512):
    np.testing.assert_array_equal(hadamard.hadamard_matrix(n), scipy.linalg.hadamard(n))


@pytest.mark.parametrize("n", [1, 2, 12, 16, 36, 64, 68, 104, 128, 576, 2048])
def test_fast_form_equals_the_matrix(rng, n):
  x = rng.standard_normal((2, 3, n)).astype(np.float32)
  h = hadamard.hadamard_matrix(n) / np.sqrt(n)
  np.testing.assert_allclose(hadamard.transform(jnp.asarray(x)), x @ h, atol=1e-5)
  back = hadamard.transform(jnp.asarray(x), inverse=True)
  np.testing.assert_allclose(back, x @ h.T, atol=1e-5)


def test_blocks_are_rotated_by_themselves(rng):
  x = rng.standard_normal((5, 24)).astype(np.float32)
  h = np.kron(np.eye(2), hadamard.hadamard_matrix(12)) / np.sqrt(12)
  np.testing.assert_allclose(hadamard.blockwise(jnp.asarray(x), 12), x @ h, atol=1e-6)
  there = hadamard.blockwise(jnp.asarray(x), 8)
  np.testing.assert_allclose(hadamard.blockwise(there, 8, inverse=True), x, atol=1e-6)


def test_gradients_norms_and_half_precision(rng):
  x = jnp.asarray(rng.standard_normal((3, 136)), jnp.float32)
  fn = lambda x: hadamard.transform(jnp.asarray(x))
  check_grads(fn, (x,), order=1, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)
  probe = jnp.asarray(rng.standard_normal((3, 136)), jnp.float32)
  gradient = jax.grad(lambda x: jnp.vdot(hadamard.transform(x), probe))(x)
  expected = hadamard.transform(probe, inverse=True)
  np.testing.assert_allclose(gradient, expected, atol=1e-5)
  norms = jnp.linalg.norm(hadamard.transform(x), axis=-1)
  np.testing.assert_allclose(norms, jnp.linalg.norm(x, axis=-1), rtol=1e-5)
  half = hadamard.transform(x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), hadamard.transform(x), atol=0.03)


def test_work_is_that_of_a_few_small_products():
  x = jax.ShapeDtypeStruct((7, 4096), jnp.float32)
  assert flops.dot_flops(hadamard.transform, x) == 7 * 4096 * 2 * (64 + 64)


def test_signs_are_signs():
  signs = hadamard.random_signs(jax.random.key(0), 64)
  assert set(np.unique(signs)) == {-1.0, 1.0}
  assert bool(jnp.any(signs != hadamard.random_signs(jax.random.key(1), 64)))


def test_what_is_not_known_says_what_is():
  with pytest.raises(errors.InputError, match="nearest are 88 and 96.*divides it 4"):
    hadamard.hadamard_matrix(92)
  with pytest.raises(errors.InputError, match="order 7 is known here"):
    hadamard.transform(jnp.ones((2, 7)))
  with pytest.raises(errors.InputError, match="orders are positive"):
    hadamard.hadamard_matrix(0)
  with pytest.raises(errors.InputError, match="blocks of 5 channels do not tile 12"):
    hadamard.blockwise(jnp.ones((2, 12)), 5)
  assert [hadamard.largest_block(n) for n in (92, 7, 12, 11008)] == [4, 1, 12, 11008]
