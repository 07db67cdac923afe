"""The sweep against brute force and least squares, the factor against the inverse."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.matmul import column_sweep


def _hessian(rng, in_dim, rank=None, tokens=200):
  """Of correlated inputs."""
  rank = in_dim if rank is None else rank
  x = rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, in_dim))
  return x.T @ x


def _rounded(started, row, i):
  del started, i
  codes = jnp.clip(jnp.round(row), -2, 1)  # two bits
  return codes, codes


def _no_start(block):
  del block
  return ()


def _objective(error, h):
  return np.trace(error.T @ h @ error)


def test_the_first_step_is_that_of_the_optimal_brain_surgeon(rng):
  """With one weight fixed, the others are where least squares puts them."""
  with jax.enable_x64(True):
    h, w = _hessian(rng, 4), rng.standard_normal((4, 1))
    factor = column_sweep.inverse_factor(jnp.asarray(h), 0.0)
    first_only = lambda started, row, i: (
      jnp.where(i == 0, jnp.round(row), row),
      (),
    )
    swept = column_sweep.sweep(jnp.asarray(w), factor.upper, 2, _no_start, first_only)
    error = np.round(w[0]) - w[0]
    # min over d of [e, d] H [e, d]^T, solved on a square root of H.
    root = np.linalg.cholesky(h).T
    rest = np.linalg.lstsq(root[:, 1:], -root[:, 0] * error[0], rcond=None)[0]
    np.testing.assert_allclose(swept.kept[1:, 0], w[1:, 0] + rest, rtol=1e-9)
    np.testing.assert_allclose(swept.kept[0, 0], np.round(w[0, 0]))
    # The closed form of the paper, eq. 2: the error is e^2 / [H^-1]_00.
    expected = error[0] ** 2 / np.linalg.inv(h)[0, 0]
    np.testing.assert_allclose(swept.loss, expected, rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_between_the_best_of_all_codes_and_the_nearest(seed):
  rng = np.random.default_rng(seed)
  h, w = _hessian(rng, 4), rng.uniform(-2, 1, (4, 1))
  factor = column_sweep.inverse_factor(jnp.asarray(h, jnp.float32), 0.0)
  swept = column_sweep.sweep(
    jnp.asarray(w, jnp.float32), factor.upper, 4, _no_start, _rounded
  )
  every = itertools.product(range(-2, 2), repeat=4)
  best = min(_objective(np.array(codes)[:, None] - w, h) for codes in every)
  nearest = _objective(np.round(w) - w, h)
  assert best * (1 - 1e-4) <= float(swept.loss) <= nearest


@pytest.mark.parametrize("block", [1, 3, 12])
def test_blocks_change_nothing_and_the_loss_is_the_objective(rng, block):
  with jax.enable_x64(True):
    h, w = _hessian(rng, 12), rng.standard_normal((12, 5))
    upper = column_sweep.inverse_factor(jnp.asarray(h), 0.0).upper
    sweep = lambda block: column_sweep.sweep(
      jnp.asarray(w), upper, block, _no_start, _rounded
    )
    swept, whole = sweep(block), sweep(4)
    np.testing.assert_array_equal(swept.kept, whole.kept)
    np.testing.assert_array_equal(swept.parts, swept.kept)
    expected = _objective(np.asarray(swept.kept) - w, h)
    np.testing.assert_allclose(swept.loss, expected, rtol=1e-9)


def test_a_block_starts_with_what_earlier_ones_left(rng):
  """`start` sees weights that make up for all before, and U_ii of its inputs."""
  with jax.enable_x64(True):
    h, w = _hessian(rng, 6), rng.standard_normal((6, 2))
    upper = column_sweep.inverse_factor(jnp.asarray(h), 0.0).upper
    keep = lambda rows, row, i: (jnp.round(row), i)
    swept = column_sweep.sweep(jnp.asarray(w), upper, 3, lambda block: block, keep)
    np.testing.assert_array_equal(swept.parts, np.arange(6))
    np.testing.assert_array_equal(swept.blocks.index, [0, 1])
    np.testing.assert_allclose(swept.blocks.rows[0], w[:3])
    np.testing.assert_allclose(
      swept.blocks.factor_diagonal.reshape(-1), jnp.diagonal(upper)
    )
    fixed = np.asarray(swept.kept[:3]) - w[:3]
    expected = w[3:] - np.linalg.solve(h[3:, 3:], h[3:, :3] @ fixed)
    np.testing.assert_allclose(swept.blocks.rows[1], expected, rtol=1e-9)


def test_the_factor_is_that_of_the_inverse(rng):
  with jax.enable_x64(True):
    h = _hessian(rng, 9)
    h[4] = h[:, 4] = 0
    upper, dead, damping = column_sweep.inverse_factor(jnp.asarray(h), 0.1)
    assert float(damping) == 0.1
    np.testing.assert_array_equal(dead, np.arange(9) == 4)
    damped = h + 0.1 * np.trace(h) / 8 * np.eye(9) + np.diag(np.arange(9) == 4)
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(damped), rtol=1e-8)
    np.testing.assert_array_equal(upper, jnp.triu(upper))


def test_damping_is_raised_where_it_must_be(rng):
  """Each of a stack has its own; what nothing helps is not finite."""
  good, singular = _hessian(rng, 16), _hessian(rng, 16, rank=3)
  hopeless = -good
  stack = jnp.asarray(np.stack([good, singular, hopeless]), jnp.float32)
  found = jax.jit(jax.vmap(lambda h: column_sweep.inverse_factor(h, 0.0)))(stack)
  finite = np.isfinite(found.upper).all(axis=(1, 2))
  np.testing.assert_array_equal(finite, [True, True, False])
  np.testing.assert_allclose(found.damping, [0, 1e-4, 1], rtol=1e-6)


def test_block_sizes_divide():
  assert column_sweep.block_size(576, 128) == 96
  assert column_sweep.block_size(1024, 128) == 128
  assert column_sweep.block_size(31, 128) == 31
  assert column_sweep.block_size(131, 128) == 1
