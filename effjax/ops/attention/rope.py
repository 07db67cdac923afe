"""Rotary position embedding, in the half-split convention.

Su et al. 2021 (arXiv:2104.09864), eq. 34, with one deviation: the paper rotates the
neighbours (2i, 2i + 1); here entry i turns with entry i + K/2, as in the Llama
checkpoints of Hugging Face ("rotate_half"). The two differ by a permutation of K.

Local letter: J = K / 2 angles.
"""

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.config import require


def rope(
  x_BLHK: jax.Array, positions_BL: jax.Array, theta: float = 10_000.0
) -> jax.Array:
  """Rotates queries or keys by their positions.

  Args:
    x_BLHK: K even.
    positions_BL: int32, [B, L] or [1, L].
    theta: base of the wavelengths; angle i is position * theta ** (-2 i / K).

  Returns:
    The dtype of x; angles and products are float32.
  """
  return rotate(x_BLHK, *angles(positions_BL, x_BLHK.shape[-1], theta))


def angles(
  positions_BL: jax.Array, head_dim: int, theta: float = 10_000.0
) -> tuple[jax.Array, jax.Array]:
  """cos_BLJ and sin_BLJ in float32, to share between queries, keys and layers."""
  require(head_dim % 2 == 0, f"rope needs an even head_dim, got {head_dim}")
  # In float64 first: at position p an ulp of the frequency is p ulps of the angle.
  frequency_J = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  frequency_J = jnp.asarray(frequency_J, jnp.float32)
  angle_BLJ = positions_BL.astype(jnp.float32)[..., None] * frequency_J[None, None]
  return jnp.cos(angle_BLJ), jnp.sin(angle_BLJ)


def rotate(x_BLHK: jax.Array, cos_BLJ: jax.Array, sin_BLJ: jax.Array) -> jax.Array:
  """Turns each pair (i, i + K/2) of x by its angle."""
  cos, sin = cos_BLJ[:, :, None], sin_BLJ[:, :, None]
  a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
  y_BLHK = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return y_BLHK.astype(x_BLHK.dtype)
