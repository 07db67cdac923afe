"""Adafactor's second moment, kept as one row and one column vector per matrix."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.optim import base


class FactoredState(NamedTuple):
  """Second moments, float32.

  Where a parameter of shape `[*stack, in, out]` is factored, `v_row` is
  `[*stack, in]`, `v_col` is `[*stack, out]` and `v` has nothing; elsewhere `v` has the
  parameter's shape and the other two have nothing (`None`).
  """

  count: jax.Array
  v_row: Any
  v_col: Any
  v: Any


class _Moments(NamedTuple):
  update: Any
  v_row: Any
  v_col: Any
  v: Any


def factored_axes(
  shape: tuple[int, ...], num_stacked: int, min_dim: int
) -> tuple[int, int] | None:
  """The row and column axis of a block, or None if it is kept whole.

  They are the two longest axes that are not stacked (the later ones among equals), in
  order; a block is factored only if both are at least `min_dim` long.
  """
  inside = range(num_stacked, len(shape))
  longest = sorted(inside, key=lambda axis: (shape[axis], axis))[-2:]
  if len(longest) < 2 or shape[longest[0]] < min_dim:
    return None
  row, col = sorted(longest)
  return row, col


def scale_by_factored_rms(
  specs: Mapping[str, Any],
  *,
  decay_exponent: float = 0.8,
  min_dim: int = 128,
  epsilon: float = 1e-30,
) -> optax.GradientTransformation:
  """Divides updates by the root of a factored running mean of their squares.

  Source: Shazeer and Stern 2018 (arXiv 1804.04235), Algorithms 4 and 5, with the decay
  1 - t^-decay_exponent of section 7.2. Equal to `optax.scale_by_factored_rms` on
  unstacked parameters; a stacked axis is never factored here, so that a layer's result
  does not depend on the layers beside it.
  """

  def axes_of(spec, array):
    return factored_axes(array.shape, base.num_stacked(spec, array.ndim), min_dim)

  def init_leaf(spec, param):
    axes = axes_of(spec, param)
    if axes is None:
      return _Moments(None, None, None, jnp.zeros(param.shape, jnp.float32))
    row, col = axes
    zeros = lambda axis: jnp.zeros(_without(param.shape, axis), jnp.float32)
    return _Moments(None, zeros(col), zeros(row), None)

  def init_fn(params):
    moments = base.map_with_specs(init_leaf, specs, params)
    return _state(jnp.zeros([], jnp.int32), moments)

  def update_fn(updates, state, params=None):
    del params
    step = (state.count + 1).astype(jnp.float32)
    decay = 1.0 - step**-decay_exponent

    def update_leaf(spec, update, v_row, v_col, v):
      grad = update.astype(jnp.float32)
      squares = jnp.square(grad) + epsilon
      average = lambda old, new: decay * old + (1.0 - decay) * new
      axes = axes_of(spec, update)
      if axes is None:
        v = average(v, squares)
        scaled = grad * jax.lax.rsqrt(v)
      else:
        row, col = axes
        v_row = average(v_row, jnp.mean(squares, axis=col))
        v_col = average(v_col, jnp.mean(squares, axis=row))
        mean = jnp.mean(v_row, axis=row, keepdims=True)
        row_factor = jnp.expand_dims(jax.lax.rsqrt(v_row / mean), col)
        col_factor = jnp.expand_dims(jax.lax.rsqrt(v_col), row)
        scaled = grad * row_factor * col_factor
      return _Moments(scaled.astype(update.dtype), v_row, v_col, v)

    moments = base.map_with_specs(
      update_leaf, specs, updates, state.v_row, state.v_col, state.v
    )
    count = optax.safe_increment(state.count)
    return _field("update", moments), _state(count, moments)

  return optax.GradientTransformation(init_fn, update_fn)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
  return shape[:axis] + shape[axis + 1 :]


def _field(name: str, moments: Any) -> Any:
  is_leaf = lambda node: isinstance(node, _Moments)
  return jax.tree.map(lambda node: getattr(node, name), moments, is_leaf=is_leaf)


def _state(count: jax.Array, moments: Any) -> FactoredState:
  v_row, v_col, v = (_field(name, moments) for name in ("v_row", "v_col", "v"))
  return FactoredState(count, v_row, v_col, v)
