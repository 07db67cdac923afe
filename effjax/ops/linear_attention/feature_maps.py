"""Feature maps: what turns queries and keys into features with positive products.

Local letters: N features; M random features.
"""

import jax
import jax.numpy as jnp

# Added to the exponents of all keys, which cancels: what keys have in practice, from 15
# down to far below 0, then has most of the range of float32 (and bfloat16), -87 to 88.
LOG_SHIFT = 30.0
# No feature of a key is above exp(60): with that, sums over 2^20 tokens of values up to
# 1000 do not overflow.
LARGEST_LOG_FEATURE = 60.0


def elu_plus_one(x_BLHK: jax.Array) -> jax.Array:
  """elu(x) + 1 (Katharopoulos et al. 2020, arXiv:2006.16236, eq. 7), in x's dtype.

  For negative x it is exp(x), and computed as such: as expm1(x) + 1 it would round to
  0 from -17 on in float32.
  """
  negative = jnp.where(x_BLHK > 0, 0, x_BLHK)  # keeps the other branch from overflowing
  return jnp.where(x_BLHK > 0, x_BLHK + 1, jnp.exp(negative))


def favor_queries(q_BLHK: jax.Array, w_MK: jax.Array) -> jax.Array:
  """Positive random features of queries, up to a factor of each query.

  Choromanski et al. 2020, arXiv:2009.14794, lemma 1 and eq. 7, are
  `exp(w . q - |q|^2 / 2) / sqrt(M)` with q scaled by K^-1/4. Whatever all features of
  one query share cancels in attention, so `|q|^2 / 2` and `sqrt(M)` are left out, and
  the largest exponent of the query is subtracted: its features lie in [0, 1], and at
  least one is 1.

  Args:
    q_BLHK: queries, float32 or bfloat16.
    w_MK: random features, see `random_features`.

  Returns:
    Features `[B, L, H, M]` in the dtype of q; exponents are float32.
  """
  log_BLHM = _project(q_BLHK, w_MK)
  log_BLHM -= jax.lax.stop_gradient(jnp.max(log_BLHM, axis=-1, keepdims=True))
  return jnp.exp(log_BLHM).astype(q_BLHK.dtype)


def favor_keys(k_BLHK: jax.Array, w_MK: jax.Array) -> jax.Array:
  """Positive random features of keys, `exp(w . k - |k|^2 / 2)` times one constant.

  k is scaled by K^-1/4. A stabilizer that depended on other keys would have to look at
  the future; a constant cancels and does not. The exponent equals
  `|w|^2 / 2 - |k - w|^2 / 2`. For keys in no special direction the largest is about
  max(w . k / |k|)^2 / 2, which is 10 to 15, and the usual one is `-|k|^2 / 2`: -4 for
  standard normal entries and K = 64, -64 for entries 4 times that, for K = 128 -6 and
  -91. With `LOG_SHIFT`, exponents down to -117 are kept and those above 30 are cut. To
  be cut, a key has to come within `sqrt(|w|^2 - 60)` of a w, where `|w|^2` is K on
  average: none does but by being aimed at it.

  Args:
    k_BLHK: keys, float32 or bfloat16.
    w_MK: random features.

  Returns:
    Features `[B, L, H, M]` in the dtype of k; exponents are float32.
  """
  log_BLHM = _project(k_BLHK, w_MK) + (LOG_SHIFT - _half_square(k_BLHK))
  return jnp.exp(jnp.minimum(log_BLHM, LARGEST_LOG_FEATURE)).astype(k_BLHK.dtype)


def _project(x_BLHK: jax.Array, w_MK: jax.Array) -> jax.Array:
  """W . x K^-1/4, accumulated in float32.

  w takes the scale, and the dtype of x: features rounded alike for queries and keys are
  but other features.
  """
  w_MK = (w_MK * w_MK.shape[-1] ** -0.25).astype(x_BLHK.dtype)
  return jnp.einsum("blhk,mk->blhm", x_BLHK, w_MK, preferred_element_type=jnp.float32)


def _half_square(x_BLHK: jax.Array) -> jax.Array:
  """|x|^2 / 2 with x scaled by K^-1/4, float32 `[B, L, H, 1]`."""
  square = jnp.sum(jnp.square(x_BLHK.astype(jnp.float32)), axis=-1, keepdims=True)
  return square / (2 * x_BLHK.shape[-1] ** 0.5)
