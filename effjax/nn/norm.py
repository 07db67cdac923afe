"""Normalization of the last axis: by its root mean square, or by mean and variance.

Sources: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4 (RMSNorm); Ba et al. 2016,
arXiv:1607.06450, eq. 4 over one token (LayerNorm); no deviations.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.weights import verbs
from effjax.weights import weight as weight_lib


class RMSNorm(nn.Module):
  """`x / sqrt(mean(x^2) + eps) * scale`, statistics in float32.

  Attributes:
    axis: logical axis that is normalized.
    eps: added to the mean square.
    num_groups: equal parts of the axis, each normalized by itself.
  """

  axis: str = "embed"
  eps: float = 1e-5
  num_groups: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes the last axis; output has the dtype of x."""
    scale = weight_lib.weight(
      self,
      "scale",
      nn.initializers.ones,
      (x.shape[-1],),
      axes=(self.axis,),
      kind="norm",
    )
    return rms_norm(x, verbs.dense(scale), self.eps, self.num_groups)


def rms_norm(
  x: jax.Array, scale: jax.Array, eps: float, num_groups: int = 1
) -> jax.Array:
  """The pure function of `RMSNorm`; `scale` has the size of x's last axis."""
  wide = x.astype(jnp.float32)
  if num_groups > 1:
    wide = wide.reshape(*x.shape[:-1], num_groups, -1)
  mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  normal = (wide * jax.lax.rsqrt(mean_square + eps)).reshape(x.shape)
  scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
  return (normal * scale).astype(x.dtype)


class LayerNorm(nn.Module):
  """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias`, statistics in float32.

  Attributes:
    axis: logical axis that is normalized.
    eps: added to the variance (BERT's default).
  """

  axis: str = "embed"
  eps: float = 1e-12

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes the last axis; output has the dtype of x."""
    # The bias is of kind "norm" as well: whatever rescales or removes a channel of a
    # norm has to treat the two alike.
    scale, bias = (
      weight_lib.weight(
        self, name, init, (x.shape[-1],), axes=(self.axis,), kind="norm"
      )
      for name, init in (
        ("scale", nn.initializers.ones),
        ("bias", nn.initializers.zeros),
      )
    )
    return layer_norm(x, verbs.dense(scale), verbs.dense(bias), self.eps)


def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> jax.Array:
  """The pure function of `LayerNorm`; scale and bias have the size of x's last axis."""
  wide = x.astype(jnp.float32)
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  lead = tuple(range(x.ndim - 1))
  normal = centred * jax.lax.rsqrt(variance + eps) * jnp.expand_dims(scale, lead)
  return (normal + jnp.expand_dims(bias, lead)).astype(x.dtype)


NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}
