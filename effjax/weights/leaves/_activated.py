"""What the leaves share whose activations are rounded too."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.ops.matmul import activations as activations_lib
from effjax.weights import verbs


def check_x_scale(x_scale: Any, shape: Sequence[int], activations: str) -> None:
  """Raises InputError unless a static scale of activations fits codes of `shape`."""
  if x_scale is None:
    return
  config.require(
    activations != "none", "a static scale (x_scale) needs rounded activations"
  )
  expected = (*shape[:-2], 1, 1)
  config.require(
    tuple(x_scale.shape) == expected,
    f"x_scale of shape {tuple(x_scale.shape)} for codes of shape {tuple(shape)}; it "
    f"must be {expected}",
  )


def scale_axes(leaf: Any, axes: Sequence[Any]) -> tuple[Any, ...] | None:
  """Logical axes of a leaf's static scale, if it has one."""
  return None if leaf.x_scale is None else (*axes[:-2], None, None)


def contract(
  leaf: Any, x: jax.Array, group_sizes: jax.Array | None = None, *, axis: int
) -> jax.Array:
  """A product of a leaf's codes with rounded activations.

  Args:
    leaf: with `activations`, `x_scale`, `scale`, `axis` and `unpacked()`.
    x, group_sizes: see ops.matmul.activations.contract.
    axis: of the arrays as they are held, that is contracted.

  Raises:
    InputError: the codes are held for another axis.
  """
  config.require(
    leaf.axis == axis,
    f"codes of {leaf.activations} activations are multiplied along the axis they are "
    "held for only; quantize this weight with activations='none'",
  )
  scale, codes = verbs.dense(leaf.scale), leaf.unpacked()
  out_first = axis == -1
  scale = jnp.swapaxes(scale, -1, -2) if out_first else scale
  outputs = codes.shape[-2 if out_first else -1]
  return activations_lib.contract(
    x,
    codes,
    # One of a whole matrix serves every output.
    jnp.broadcast_to(scale, (*scale.shape[:-1], outputs)),
    leaf.x_scale,
    group_sizes,
    kind=leaf.activations,
    out_first=out_first,
  )
