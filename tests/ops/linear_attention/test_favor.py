"""FAVOR+: features, their estimate of the softmax kernel, and its numerical range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.linear_attention import api, feature_maps, random_features, reference


def _qkv(length, head_dim, heads=2, scale=1.0, seed=0):
  rng = np.random.default_rng(seed)
  shape = (1, length, heads, head_dim)
  q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3))
  return scale * q, scale * k, v


def _softmax_attention(q, k, v, is_causal):
  scores = jnp.einsum("blhk,bshk->bhls", q, k) / q.shape[-1] ** 0.5
  seen = jnp.ones(scores.shape, bool)
  weights = jax.nn.softmax(scores, where=jnp.tril(seen) if is_causal else seen)
  return jnp.einsum("bhls,bshp->blhp", weights, v)


def _favor(q, k, v, w, is_causal=True):
  q, k = feature_maps.favor_queries(q, w), feature_maps.favor_keys(k, w)
  return api.linear_attention(q, k, v, is_causal=is_causal, chunk=8, eps=1e-30)[0]


@pytest.mark.parametrize("kind", ["draw", "fixed"])
def test_features_are_orthogonal_in_blocks(kind):
  num_features, head_dim = 20, 8
  source = {"draw": jax.random.key(3), "fixed": 3}[kind]
  w = np.asarray(getattr(random_features, kind)(source, num_features, head_dim))
  assert w.shape == (num_features, head_dim) and w.dtype == np.float32
  for start in range(0, num_features, head_dim):
    gram = w[start : start + head_dim] @ w[start : start + head_dim].T
    off = gram - np.diag(np.diag(gram))
    assert np.abs(off).max() <= 1e-5 * np.diag(gram).max()


def test_fixed_features_are_a_constant_of_the_seed():
  w = random_features.fixed(3, 20, 8)
  random_features.fixed.cache_clear()
  np.testing.assert_array_equal(random_features.fixed(3, 20, 8), w)
  assert np.abs(random_features.fixed(4, 20, 8) - w).max() > 0.1
  with pytest.raises(ValueError, match="read-only"):
    w[0, 0] = 1


def test_each_feature_is_a_standard_gaussian():
  """Every entry of every row, over draws: mean 0 and variance 1, within 5 errors."""
  num_draws, head_dim = 4000, 3
  keys = jax.random.split(jax.random.key(0), num_draws)
  draw = lambda key: random_features.draw(key, 5, head_dim)
  w = np.asarray(jax.jit(jax.vmap(draw))(keys), np.float64)
  assert np.abs(w.mean(0)).max() < 5 / num_draws**0.5
  assert np.abs(w.var(0) - 1).max() < 5 * (2 / num_draws) ** 0.5
  # Independent norms: |w|^2 has the variance 2 K of a chi-squared variable.
  assert abs((w**2).sum(-1).var() / (2 * head_dim) - 1) < 0.1


def test_the_kernel_estimate_is_unbiased():
  """Over 20000 draws the mean is exp(q . k / sqrt(K)) within 4 standard errors."""
  head_dim, num_draws = 4, 20_000
  q, k, _ = _qkv(3, head_dim, heads=1)
  keys = jax.random.split(jax.random.key(1), num_draws)

  def estimate(key):
    w = random_features.draw(key, 4, head_dim)
    q_features, k_features = (
      reference.favor_features(z[0], w) for z in (q[None], k[None])
    )
    return q_features[0, :, 0] @ k_features[0, :, 0].T

  estimates = np.asarray(jax.jit(jax.vmap(estimate))(keys), np.float64)
  wanted = np.exp(np.asarray(q[0, :, 0] @ k[0, :, 0].T, np.float64) / head_dim**0.5)
  error = estimates.std(0) / num_draws**0.5
  assert (np.abs(estimates.mean(0) - wanted) < 4 * error).all()
  assert (error < 0.1 * wanted).all()


def test_error_halves_with_four_times_the_features():
  """Root mean square error of attention over 16 seeds, against softmax attention."""
  q, k, v = _qkv(24, 16, scale=0.5)  # the variance grows like exp(|q + k|^2)
  wanted = _softmax_attention(q, k, v, is_causal=True)

  @jax.jit
  def error(w_SMK):
    estimate = lambda w: jnp.mean((_favor(q, k, v, w) - wanted) ** 2)
    return jnp.sqrt(jnp.mean(jax.lax.map(estimate, w_SMK)))

  few, many = (
    float(error(jnp.stack([random_features.fixed(s, m, 16) for s in range(16)])))
    for m in (64, 256)
  )
  assert many < 0.1 * float(jnp.std(wanted))
  assert 0.4 < many / few < 0.6


def _grads(fn, *arrays):
  probe = np.random.default_rng(2).standard_normal(arrays[2].shape).astype("f4")
  loss = lambda *arrays: (lambda y: (jnp.sum(y * probe), y))(fn(*arrays))
  return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)


@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("is_causal", [True, False])
def test_stabilizers_cancel(is_causal, head_dim):
  """Outputs and gradients are those of the features as the paper writes them."""
  q, k, v = _qkv(19, head_dim)
  w = jnp.asarray(random_features.fixed(0, 32, head_dim))

  def naive(q, k, v):
    q, k = reference.favor_features(q, w), reference.favor_features(k, w)
    return reference.linear_attention(q, k, v, causal=is_causal, eps=0.0)

  wanted = _grads(naive, q, k, v)
  got = _grads(lambda q, k, v: _favor(q, k, v, w, is_causal), q, k, v)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    limit = 1e-4 * max(1.0, float(jnp.abs(b).max()))
    assert float(jnp.abs(a - b).max()) <= limit


@pytest.mark.parametrize(
  ("head_dim", "q_scale", "k_scale"),
  [(64, 100.0, 1.0), (64, 1.0, 4.0), (128, 10.0, 3.0), (128, 1.0, 100.0)],
)
def test_large_queries_and_keys_stay_finite(head_dim, q_scale, k_scale):
  """Keys of several times the usual size have weights, and they sum to one."""
  q, k, v = _qkv(19, head_dim)
  q, k, v = q * q_scale, k * k_scale, jnp.ones_like(v)
  w = jnp.asarray(random_features.fixed(0, 256, head_dim))
  grads, y = _grads(lambda q, k, v: _favor(q, k, v, w), q, k, v)
  assert all(bool(jnp.isfinite(g).all()) for g in grads)
  if k_scale <= 4:
    np.testing.assert_allclose(y, 1.0, rtol=1e-4)
  else:  # no feature is left, so no weight
    assert not np.asarray(y).any()


def test_key_features_are_bounded():
  """At the feature itself the exponent is |w|^2 / 2, here past float32's range."""
  head_dim = 256
  w = jnp.asarray(random_features.fixed(0, 256, head_dim))
  k = (w * head_dim**0.25)[None, :, None]
  features = feature_maps.favor_keys(k, w)
  assert bool(jnp.isfinite(features).all())
  exponent = float(jnp.log(features.max()))
  np.testing.assert_allclose(exponent, feature_maps.LARGEST_LOG_FEATURE, rtol=1e-5)
