"""Every selected matrix of a tree, one at a time, to a leaf of a number format."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import merged
from effjax.compress.quantize import _activation_scales
from effjax.core import errors
from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights.formats import base
from effjax.weights.leaves import (
  block_sparse,
  compressed,
  low_rank,
  masked,
  n_of_m,
  rotated,
)

_KINDS = ("matrix", "embedding")
# Pruned weights of which quantizers take the values, as they take any others.
_PRUNED = (masked.Masked, n_of_m.NOfM, block_sparse.BlockSparse)
# `one(path, w)`: the leaf of a matrix [*stack, in, out], or of an embedding turned so.
One = Callable[[str, jax.Array, int], Any]


def replace(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: Collection[str],
  name: str,
  one: One,
  options: base.FormatOptions | None = None,
  stats: Any = None,
) -> dict[str, Any]:
  """The tree with leaves in place of the selected parameters.

  A `Masked` parameter stays masked: its values are quantized, and a zero that the
  format has stays one. So does a `Rotated` one stay rotated, and an `NOfM` or
  `BlockSparse` one sparse: what stays is quantized, of blocks each as a matrix of its
  own. Of a `LowRank` one each factor is quantized.

  Args:
    params, specs: the tree.
    paths: of the selected parameters.
    name: of the transform, for messages.
    one: makes the leaf: `one(path, w, axis)`, w always `[*stack, in, out]`; with axis
      -1 it is an embedding transposed, and the leaf must hold it `[V, D]`.
    options: of the format, where the leaves are made for their own activations; they
      get static scales from `stats`, if the options say so.
    stats: statistics of calibration.

  Raises:
    InputError: a parameter of another kind, one that is quantized already, has adapters
      or is not finite, or what `one` says of it, with its path.
  """
  found = tree_lib.flatten(stats or {})
  finite: dict[str, jax.Array] = {}

  def leaf_of(path: str, w: jax.Array, spec: Any, whole: bool = True) -> Any:
    return leaf_along(-1 if spec.kind == "embedding" else -2, path, w, spec, whole)

  def leaf_along(axis: int, path: str, w: Any, spec: Any, whole: bool = True) -> Any:
    finite[path] = jnp.all(jnp.isfinite(w))
    try:
      leaf = one(path, w if axis == -2 else jnp.swapaxes(w, -1, -2), axis)
      if options is None:
        return leaf
      known = spec if whole else None
      return _activation_scales.attach(leaf, found.get(path), path, known, options)
    except errors.InputError as error:
      raise errors.InputError(f"{path}: {error}") from None

  def change(path: str, leaf: Any, spec: Any) -> Any:
    if path not in paths:
      return leaf
    if spec.kind not in _KINDS:
      raise errors.InputError(
        f"{name} cannot quantize {path} of kind {spec.kind!r}; it takes "
        + ", ".join(_KINDS)
      )
    merged.require(name, path, leaf)
    if isinstance(leaf, _PRUNED) and not leaf_lib.is_leaf_kind(leaf.values):
      if options is not None and options.activations not in (None, "none"):
        raise errors.InputError(
          f"{path} is pruned, which multiplies a dense weight; quantize it with "
          "activations='none'"
        )
      inner = leaf.dense() if isinstance(leaf, masked.Masked) else leaf.values
      # Blocks are held by inputs and outputs, whatever they are of.
      blocks = isinstance(leaf, block_sparse.BlockSparse)
      along = functools.partial(leaf_along, -2) if blocks else leaf_of
      return dataclasses.replace(leaf, values=along(path, inner, spec))
    if isinstance(leaf, rotated.Rotated) and not leaf_lib.is_leaf_kind(leaf.values):
      _refuse_static_scales(path, options)
      return dataclasses.replace(leaf, values=leaf_of(path, leaf.values, spec))
    if isinstance(leaf, low_rank.LowRank) and not any(
      map(leaf_lib.is_leaf_kind, (leaf.left, leaf.right))
    ):
      left, right = (
        leaf_of(f"{path}.{part}", getattr(leaf, part), spec, whole=False)
        for part in ("left", "right")
      )
      return low_rank.LowRank.create(left, right)
    _require_array(path, leaf)
    return leaf_of(path, leaf, spec)

  made = tree_lib.map_leaves(change, params, specs)
  _require_finite(finite)
  return made


def _require_array(path: str, leaf: Any) -> None:
  """Raises InputError for a leaf of which nothing inside can be quantized."""
  if isinstance(leaf, compressed.Compressed):
    raise errors.InputError(
      f"{path} is packed, a list of weights without inputs or outputs; quantize it "
      "before pack"
    )
  if leaf_lib.is_leaf_kind(leaf):
    raise errors.InputError(
      f"{path} is already a {leaf.kind} leaf; start this stage after a plain one"
    )


def _require_finite(finite: Mapping[str, jax.Array]) -> None:
  """Raises InputError for the first parameter with a NaN or an infinity."""
  # A plan traces this on shapes, of whose values there is nothing to say.
  if any(isinstance(flag, jax.core.Tracer) for flag in finite.values()):
    return
  bad = [path for path, flag in jax.device_get(dict(finite)).items() if not flag]
  if bad:
    raise errors.InputError(
      f"{bad[0]} holds infinities or NaNs, which no grid has (of {len(bad)} of "
      f"{len(finite)} parameters); the model is damaged, or its training diverged"
    )


def _refuse_static_scales(path: str, options: base.FormatOptions | None) -> None:
  """Raises InputError if the inputs of a rotated matrix were to get static scales."""
  if options is not None and options.static_activations:
    raise errors.InputError(
      f"{path} is rotated, and so are its inputs while running, of which calibration "
      "knows no scale; use activation_scale='dynamic'"
    )
