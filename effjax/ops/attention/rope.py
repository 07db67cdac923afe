"""Rotary position embedding.

Su et al. 2021 (arXiv:2104.09864), eq. 34. Which entries of a head turn together is a
convention, and the two in use differ by a permutation of K:

- halves: entry i with entry i + K/2, as in the Llama checkpoints of Hugging Face
  ("rotate_half"); the default;
- interleaved: the neighbours 2i and 2i + 1, as in the paper and in DeepSeek's weights.

Local letter: J = K / 2 angles.
"""

import jax
import jax.numpy as jnp

from effjax.ops.attention import rope_scaling


def rope(
  x_BLHK: jax.Array,
  positions_BL: jax.Array,
  theta: float = 10_000.0,
  scaling: rope_scaling.RopeScaling | None = None,
  interleaved: bool = False,
) -> jax.Array:
  """Rotates queries or keys by their positions.

  Args:
    x_BLHK: K even.
    positions_BL: int32, [B, L] or [1, L].
    theta: base of the wavelengths; angle i is position * theta ** (-2 i / K).
    scaling: stretches the positions, and scales the result by its attention factor.
    interleaved: neighbours turn together, not halves.

  Returns:
    The dtype of x; angles and products are float32.
  """
  cos_BLJ, sin_BLJ = angles(positions_BL, x_BLHK.shape[-1], theta, scaling)
  return rotate(x_BLHK, cos_BLJ, sin_BLJ, interleaved)


def angles(
  positions_BL: jax.Array,
  head_dim: int,
  theta: float = 10_000.0,
  scaling: rope_scaling.RopeScaling | None = None,
) -> tuple[jax.Array, jax.Array]:
  """cos_BLJ and sin_BLJ in float32, to share between queries, keys and layers.

  Both are multiplied by the attention factor of the scaling, which is 1 but for YaRN.
  """
  # In float64 first: at position p an ulp of the frequency is p ulps of the angle.
  frequency_J = rope_scaling.frequencies(head_dim, theta, scaling)
  frequency_J = jnp.asarray(frequency_J, jnp.float32)
  angle_BLJ = positions_BL.astype(jnp.float32)[..., None] * frequency_J[None, None]
  cos_BLJ, sin_BLJ = jnp.cos(angle_BLJ), jnp.sin(angle_BLJ)
  factor = rope_scaling.attention_factor(scaling)
  return (cos_BLJ, sin_BLJ) if factor == 1 else (cos_BLJ * factor, sin_BLJ * factor)


def rotate(
  x_BLHK: jax.Array,
  cos_BLJ: jax.Array,
  sin_BLJ: jax.Array,
  interleaved: bool = False,
) -> jax.Array:
  """Turns each pair of x by its angle; pairs as the module's docstring says."""
  cos, sin = cos_BLJ[:, :, None], sin_BLJ[:, :, None]
  wide = x_BLHK.astype(jnp.float32)
  if interleaved:
    pairs = wide.reshape(*x_BLHK.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    y_BLHK = y.reshape(x_BLHK.shape)
  else:
    a, b = jnp.split(wide, 2, axis=-1)
    y_BLHK = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return y_BLHK.astype(x_BLHK.dtype)
