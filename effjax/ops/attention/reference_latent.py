"""Naive multi-head latent attention in float32, equation by equation.

DeepSeek-AI 2024 (arXiv:2405.04434), appendix C, eq. 37 to 47, in its symbols (W^DQ is
`W["DQ"]`, stored `[in, out]`); with the RMS norm of both latents that its section 3.1.2
adds, and the rotation of arXiv:2104.09864, eq. 34, as products of complex numbers.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def latent_attention(
  h_BLD: jax.Array,
  W: Mapping[str, jax.Array],
  *,
  num_heads: int,
  positions_BL: jax.Array,
  segments_BL: jax.Array,
  frequency_J: jax.Array,
  rotation_scale: float = 1.0,
  score_scale: float = 1.0,
  causal: bool = True,
  eps: float = 1e-6,
) -> jax.Array:
  """Head by head, every pair of query and key, every key and value expanded.

  Args:
    h_BLD: inputs.
    W: "DQ" and "UQ" (or "UQ" alone, of h itself), "QR", "DKV", "UK", "KR", "UV", "O",
      and the scales of the norms, "cQ" and "cKV".
    num_heads: n_h.
    positions_BL: int32.
    segments_BL: int32; a query sees keys of its own segment, 0 is padding.
    frequency_J: radians a position of each pair of neighbours.
    rotation_scale: factor of rotated queries and of rotated keys.
    score_scale: factor of the scores beside (d_h + d_h^R) ** -0.5.
    causal: a query sees the keys up to its own index.
    eps: added to mean squares.

  Returns:
    u_BLD; padding is zero.
  """
  with jax.default_matmul_precision("highest"):
    c_Q = _norm(h_BLD @ W["DQ"], W["cQ"], eps) if "DQ" in W else h_BLD  # 37
    c_KV = _norm(h_BLD @ W["DKV"], W["cKV"], eps)  # 41
    q_C = _heads(c_Q @ W["UQ"], num_heads)  # 38
    q_R = _heads(c_Q @ W["QR"], num_heads)  # 39
    k_C = _heads(c_KV @ W["UK"], num_heads)  # 42
    v_C = _heads(c_KV @ W["UV"], num_heads)  # 45
    turn_BLJ = rotation_scale * jnp.exp(
      1j * positions_BL[:, :, None] * frequency_J[None, None]
    )
    k_R = _rope(h_BLD @ W["KR"], turn_BLJ)  # 43

    seen_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    seen_BLL &= segments_BL[:, None, :] > 0
    if causal:
      index_L = jnp.arange(h_BLD.shape[1])
      seen_BLL &= index_L[None, :, None] >= index_L[None, None, :]
    alive_BL1 = seen_BLL.any(-1, keepdims=True)
    o = []
    for i in range(num_heads):
      q_i = jnp.concatenate([q_C[i], _rope(q_R[i], turn_BLJ)], axis=-1)  # 40
      k_i = jnp.concatenate([k_C[i], k_R], axis=-1)  # 44
      s_i = score_scale * q_i.shape[-1] ** -0.5 * (q_i @ k_i.swapaxes(1, 2))
      p_i = jax.nn.softmax(s_i, where=seen_BLL | ~alive_BL1)
      o.append(jnp.where(alive_BL1, p_i @ v_C[i], 0.0))  # 46
    return jnp.concatenate(o, axis=-1) @ W["O"]  # 47


def _norm(c: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  root = jnp.sqrt(jnp.mean(c**2, axis=-1, keepdims=True) + eps)
  return c / root * scale[None, None]


def _heads(x_BLX: jax.Array, num_heads: int) -> list[jax.Array]:
  return jnp.split(x_BLX, num_heads, axis=-1)


def _rope(x_BLK: jax.Array, turn_BLJ: jax.Array) -> jax.Array:
  z_BLJ = (x_BLK[..., 0::2] + 1j * x_BLK[..., 1::2]) * turn_BLJ
  return jnp.stack([z_BLJ.real, z_BLJ.imag], axis=-1).reshape(x_BLK.shape)
