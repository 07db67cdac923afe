"""Selected matrices of a tree to fake-quantized leaves."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress.quantize import _matrices
from effjax.core import tree as tree_lib
from effjax.weights.leaves import fake_quantized, masked

# `grid(path, w)`: trained parts of the grid of a matrix [*stack, in, out], as
# `FakeQuantized.create` takes them, each [*stack, groups, out].
Grid = Callable[[str, jax.Array], Mapping[str, jax.Array]]


def wrap(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: Collection[str],
  name: str,
  options: Any,
  stats: Any = None,
  grid: Grid | None = None,
) -> dict[str, Any]:
  """The tree with fake-quantized leaves, a mask inside of its leaf.

  Args:
    params, specs, paths, name: see _matrices.replace.
    options: FormatOptions of the leaves.
    stats: statistics of calibration, for static scales of activations.
    grid: makes what is trained of the grid; None for nothing.
  """

  def one(path: str, w: jax.Array, axis: int) -> fake_quantized.FakeQuantized:
    parts = {} if grid is None else grid(path, w)
    if axis == -1:
      w = jnp.swapaxes(w, -1, -2)
      parts = {name: jnp.swapaxes(part, -1, -2) for name, part in parts.items()}
    return fake_quantized.FakeQuantized.create(w, options, **parts, axis=axis)

  made = _matrices.replace(params, specs, paths, name, one, options, stats)
  return tree_lib.map_leaves(lambda path, leaf: _mask_inside(leaf), made)


def _mask_inside(leaf: Any) -> Any:
  """The grid is fitted to exact zeros, whatever an optimizer does to pruned values."""
  if not isinstance(leaf, masked.Masked):
    return leaf
  if not isinstance(leaf.values, fake_quantized.FakeQuantized):
    return leaf
  fake = leaf.values
  return dataclasses.replace(fake, values=dataclasses.replace(leaf, values=fake.values))
