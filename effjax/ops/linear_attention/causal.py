"""Causal linear attention and retention on the chunked recurrence.

Both are the state-space recurrence with step size 1: values are its inputs, keys and
queries its projections, and the decay is none or one constant a head.
N features, P values, of a head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from effjax.ops.linear_attention import normalizer
from effjax.ops.recurrence import api as recurrence_ops


def linear_attention(
  q_BLHN: jax.Array,
  k_BLHN: jax.Array,
  v_BLHP: jax.Array,
  *,
  rotated: tuple[jax.Array, jax.Array] | None = None,
  segments_BL: jax.Array | None = None,
  initial_state_BHPN: jax.Array | None = None,
  chunk: int = 64,
  eps: float = 1e-10,
) -> tuple[jax.Array, jax.Array]:
  """Linear attention over the past; see `api.linear_attention`.

  Returns:
    y_BLHP in the dtype of v, and the float32 state `[B, H, P + 1, N]` after the last
    token: the sum of v k^T, and in the last row that of k.
  """
  log_decay_H = np.zeros(q_BLHN.shape[2], np.float32)
  run = functools.partial(
    _recurrence, log_decay_H=log_decay_H, segments_BL=segments_BL, chunk=chunk
  )
  values = normalizer.with_ones(v_BLHP)
  if rotated is None:
    sums, state = run(q_BLHN, k_BLHN, values, initial_state_BHPN=initial_state_BHPN)
    sums_BLHP, weight_BLH1 = sums[..., :-1], sums[..., -1:]
  else:
    old = (None, None)
    if initial_state_BHPN is not None:
      old = initial_state_BHPN[:, :, :-1], initial_state_BHPN[:, :, -1:]
    sums_BLHP, state = run(*rotated, v_BLHP, initial_state_BHPN=old[0])
    weight_BLH1, keys = run(q_BLHN, k_BLHN, values[..., -1:], initial_state_BHPN=old[1])
    state = jnp.concatenate([state, keys], axis=2)
  return normalizer.divide(sums_BLHP, weight_BLH1, eps), state


def log_decays(num_heads: int) -> np.ndarray:
  """log(1 - 2^(-5 - h)) of heads h = 0, 1, ... (arXiv:2307.08621, eq. 8), float32.

  As log1p in float64: in float32 the decay itself rounds to 1 from head 20 on.
  """
  return np.log1p(-(2.0 ** (-5.0 - np.arange(num_heads)))).astype(np.float32)


def retention(
  q_BLHK: jax.Array,
  k_BLHK: jax.Array,
  v_BLHP: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BHPN: jax.Array | None = None,
  chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
  """S_l = gamma S_(l-1) + v_l k_l^T and y_l = S_l q_l / sqrt(K), chunk by chunk.

  Sun et al. 2023, arXiv:2307.08621, eq. 6 to 8, before the norm. Deviations: the three
  normalizations of section 2.3 that only rescale the outputs of a head at one position
  are left out, since the norm that follows undoes them.

  Args:
    q_BLHK, k_BLHK: rotated queries and keys.
    v_BLHP: values; P may differ from K.
    segments_BL: integer segment ids; documents do not meet, 0 is padding.
    initial_state_BHPN: float32 state before the first token, zeros by default; N = K.
    chunk: tokens processed by matrix products at a time.

  Returns:
    y_BLHP in the dtype of v, and the float32 state after the last token.
  """
  return _recurrence(
    q_BLHK * q_BLHK.shape[-1] ** -0.5,
    k_BLHK,
    v_BLHP,
    log_decay_H=log_decays(q_BLHK.shape[2]),
    segments_BL=segments_BL,
    initial_state_BHPN=initial_state_BHPN,
    chunk=chunk,
  )


def _recurrence(
  q_BLHN: jax.Array,
  k_BLHN: jax.Array,
  v_BLHP: jax.Array,
  *,
  log_decay_H: np.ndarray,
  segments_BL: jax.Array | None,
  initial_state_BHPN: jax.Array | None,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  return recurrence_ops.ssd(
    v_BLHP,
    jnp.ones(v_BLHP.shape[:3], jnp.float32),
    jnp.asarray(log_decay_H),
    k_BLHN,
    q_BLHN,
    segments_BL=segments_BL,
    initial_state_BHPN=initial_state_BHPN,
    chunk=chunk,
  )
