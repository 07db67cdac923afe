"""Optax transformations that measure each block (one layer's matrix or vector) alone.

Optax's own take one norm over a whole array, which mixes the layers of a stacked one.
Each is stateless, works in float32 and keeps the dtype of the update.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from effjax.optim import base


def scale_by_trust_ratio(specs: Mapping[str, Any]) -> optax.GradientTransformation:
  """Multiplies the update of each block by ||parameter|| / ||update||.

  Source: You et al. 2020 (arXiv 1904.00962), Algorithm 2, with the identity as the
  function phi. The ratio is 1 where either norm is 0, so that zeros can start moving.
  """

  def scale(spec, update, param):
    axes = base.block_axes(spec, update.ndim)
    param_norm = _norm(param, axes)
    update_norm = _norm(update, axes)
    usable = (param_norm > 0) & (update_norm > 0)
    ratio = jnp.where(usable, param_norm / jnp.where(usable, update_norm, 1.0), 1.0)
    return (update * ratio).astype(update.dtype)

  return _stateless(scale, specs)


def clip_by_rms(
  specs: Mapping[str, Any], threshold: float
) -> optax.GradientTransformation:
  """Scales each block's update down to a root mean square of `threshold` at most.

  Source: Shazeer and Stern 2018 (arXiv 1804.04235), section 6.
  """

  def clip(spec, update, param):
    del param
    rms = _rms(update, base.block_axes(spec, update.ndim))
    return (update / jnp.maximum(1.0, rms / threshold)).astype(update.dtype)

  return _stateless(clip, specs)


def scale_by_param_rms(
  specs: Mapping[str, Any], minimum: float
) -> optax.GradientTransformation:
  """Multiplies each block's update by max(minimum, rms of the parameter).

  Source: Shazeer and Stern 2018 (arXiv 1804.04235), section 8 (epsilon_2 = minimum).
  """

  def scale(spec, update, param):
    rms = _rms(param, base.block_axes(spec, param.ndim))
    return (update * jnp.maximum(rms, minimum)).astype(update.dtype)

  return _stateless(scale, specs)


def _stateless(
  fn: Callable[..., jax.Array], specs: Mapping[str, Any]
) -> optax.GradientTransformation:
  def update_fn(updates, state, params=None):
    if params is None:
      raise ValueError("update needs the parameters: tx.update(updates, state, params)")
    return base.map_with_specs(fn, specs, updates, params), state

  return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  squares = jnp.square(x.astype(jnp.float32))
  return jnp.sqrt(jnp.sum(squares, axis=axes, keepdims=True))


def _rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  squares = jnp.square(x.astype(jnp.float32))
  return jnp.sqrt(jnp.mean(squares, axis=axes, keepdims=True))
