"""Linear attention, FAVOR+ and retention as their papers write them, in float32.

Every pair of tokens, O(L^2): the definitions the fast forms are tested with.
Letters: L queries, S keys; N features, P values, of a head; M random features.
"""

import jax
import jax.numpy as jnp

from effjax.ops.recurrence import segments as segment_ops


def linear_attention(
  q_BLHN: jax.Array,
  k_BLHN: jax.Array,
  v_BLHP: jax.Array,
  *,
  causal: bool = True,
  rotated: tuple[jax.Array, jax.Array] | None = None,
  segments_BL: jax.Array | None = None,
  eps: float = 1e-10,
) -> jax.Array:
  """y_l = sum_s (q_l . k_s) v_s / (sum_s q_l . k_s + eps), q and k being features.

  Katharopoulos et al. 2020, arXiv:2006.16236, eq. 4 and 8: over all s, or s <= l if
  causal. With `rotated`, other q and k for the numerator: Su et al. 2021,
  arXiv:2104.09864, eq. 19.
  """
  seen_BLS = _seen(q_BLHN.shape[:2], causal, segments_BL)
  weights_BHLS = _products(q_BLHN, k_BLHN, seen_BLS)
  numerator_BHLS = weights_BHLS if rotated is None else _products(*rotated, seen_BLS)
  y_BLHP = jnp.einsum("bhls,bshp->blhp", numerator_BHLS, v_BLHP.astype(jnp.float32))
  return y_BLHP / (jnp.sum(weights_BHLS, axis=-1).swapaxes(1, 2)[..., None] + eps)


def favor_features(x_BLHK: jax.Array, w_MK: jax.Array) -> jax.Array:
  """exp(w . x - |x|^2 / 2) / sqrt(M) of x K^-1/4, positive random features.

  Choromanski et al. 2020, arXiv:2009.14794, eq. 5 and 7: the product of those of q and
  of k is, on average over w, exp(q . k / sqrt(K)).
  """
  x_BLHK = x_BLHK.astype(jnp.float32) * x_BLHK.shape[-1] ** -0.25
  half_square_BLH1 = jnp.sum(x_BLHK**2, axis=-1, keepdims=True) / 2
  log_BLHM = jnp.einsum("blhk,mk->blhm", x_BLHK, w_MK) - half_square_BLH1
  return jnp.exp(log_BLHM) / w_MK.shape[0] ** 0.5


def retention(
  q_BLHK: jax.Array,
  k_BLHK: jax.Array,
  v_BLHP: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
) -> jax.Array:
  """(Q K^T / sqrt(K) * D) V with D[l, s] = gamma^(l - s) for l >= s, and 0 for l < s.

  Sun et al. 2023, arXiv:2307.08621, eq. 5 and 8, q and k rotated already. Distances
  count tokens, not padding.
  """
  num_rows, length, num_heads, head_dim = q_BLHK.shape
  gamma_H = 1 - 2.0 ** (-5 - jnp.arange(num_heads))
  if segments_BL is None:
    segments_BL = jnp.ones((num_rows, length), jnp.int32)
  index_BL = jnp.cumsum(segments_BL != 0, axis=1)
  distance_BLS = index_BL[:, :, None] - index_BL[:, None, :]
  seen_BLS = _seen((num_rows, length), True, segments_BL)
  decay_BHLS = gamma_H[None, :, None, None] ** jnp.maximum(distance_BLS, 0)[:, None]
  weights_BHLS = _products(q_BLHK * head_dim**-0.5, k_BLHK, seen_BLS) * decay_BHLS
  return jnp.einsum("bhls,bshp->blhp", weights_BHLS, v_BLHP.astype(jnp.float32))


def _products(q_BLHN: jax.Array, k_BLHN: jax.Array, seen_BLS: jax.Array) -> jax.Array:
  q_BLHN, k_BLHN = q_BLHN.astype(jnp.float32), k_BLHN.astype(jnp.float32)
  products_BHLS = jnp.einsum("blhn,bshn->bhls", q_BLHN, k_BLHN)
  return jnp.where(seen_BLS[:, None], products_BHLS, 0.0)


def _seen(
  shape_BL: tuple[int, ...], causal: bool, segments_BL: jax.Array | None
) -> jax.Array:
  """Which keys s (last axis) a query l sees: of its document, and no padding."""
  num_rows, length = shape_BL
  seen_BLS = jnp.ones((num_rows, length, length), bool)
  if causal:
    seen_BLS = jnp.tril(seen_BLS)
  if segments_BL is not None:
    document_BL = segment_ops.documents(segments_BL)
    seen_BLS &= document_BL[:, :, None] == document_BL[:, None, :]
    seen_BLS &= segments_BL[:, None, :] != 0
  return seen_BLS
