"""Pruning that changes what stays: what SparseGPT and OBS share."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import hessians, merged
from effjax.compress.prune import _masks
from effjax.core import config, errors, select, technique
from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights.formats import base
from effjax.weights.leaves import n_of_m

# `one(w, hessian, used, sparsity)`: values, mask and report of one matrix [I, O]; of
# options with a number format codes and their grid instead of values.
One = Callable[..., tuple[Any, jax.Array, hessians.Report]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweptOptions(_masks.PruneOptions):
  """Options of pruning that makes up for what is pruned.

  Attributes:
    budget: "uniform" (the default), "erk" or "owl".
    damping: what is added to the Hessian's diagonal, as a share of its mean.
  """

  budget: str = "uniform"
  damping: float = 0.01

  def __post_init__(self):
    super().__post_init__()
    config.require(self.damping >= 0, f"damping={self.damping} must not be negative")
    config.require(
      self.budget != "global",
      "budget='global' compares scores before anything is pruned, while these change "
      "with every weight that is; use uniform, erk or owl",
    )

  def check_inputs(self, in_dim: int) -> None:
    """Raises InputError for a matrix of so many inputs that cannot be pruned."""

  @property
  def number_format(self) -> base.Format | None:
    """What stays is held in it; None for plain values."""
    return None


def transform(name: str, one: One, options_cls: type) -> technique.Transform:
  """The transform that prunes each matrix with `one`.

  Args:
    name: of the transform.
    one: jitted, with the keyword `options`.
    options_cls: of the transform, a subclass of SweptOptions.
  """

  def fn(
    params: Mapping[str, Any],
    specs: Mapping[str, Any],
    stats: Any,
    paths: Collection[str],
    options: SweptOptions,
  ) -> dict[str, Any]:
    """Replaces the selected parameters by pruned leaves over new values.

    Raises:
      InputError: see _swept.prune.
    """
    of_matrix = functools.partial(one, options=options)
    return prune(params, specs, stats, paths, name, of_matrix, options)

  return technique.Transform(
    fn=fn,
    options_cls=options_cls,
    default_where=select.Where(kind=("matrix",)),
    collect=("hessian",),
  )


def prune(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  name: str,
  one: One,
  options: SweptOptions,
) -> dict[str, Any]:
  """The tree with pruned leaves over new values of the selected parameters.

  Args:
    params, specs: the tree.
    stats: of calibration, with Hessians.
    paths: of the selected parameters.
    name: of the transform.
    one: prunes a matrix.
    options: of the transform.

  Raises:
    InputError: a parameter is not plain, or has no Hessian that can be used, or one of
      fewer tokens than it has inputs.
  """
  flat, about = tree_lib.flatten(params), tree_lib.flatten(specs)
  found = tree_lib.flatten(stats or {})
  hessians.require_tokens({path: found[path] for path in paths if path in found})
  turned = {path: about[path].kind == "embedding" for path in sorted(paths)}
  weights, usable = {}, {}
  for path, turn in turned.items():
    w, kind = flat[path], about[path].kind
    if kind not in _masks.KINDS:
      raise errors.InputError(
        f"{name} cannot prune {path} of kind {kind!r}; it takes "
        + ", ".join(_masks.KINDS)
      )
    merged.require(name, path, w)
    if leaf_lib.is_leaf_kind(w):
      raise errors.InputError(
        f"{path} is already a {w.kind} leaf, whose values cannot be changed; start "
        "this stage after a plain one"
      )
    weights[path] = jnp.swapaxes(w, -1, -2) if turn else w
    try:
      usable[path] = hessians.usable(name, found.get(path), weights[path])
      options.build_pattern().unit(*weights[path].shape[-2:])
      options.check_inputs(weights[path].shape[-2])
    except errors.InputError as error:
      raise errors.InputError(f"{path}: {error}") from None
  sparsities = _sparsities(weights, usable, about, options)
  reports: dict[str, hessians.Report] = {}
  masks: dict[str, jax.Array] = {}
  for path, w in weights.items():
    of_inputs = usable[path]
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    stack = w.shape[:-2]
    share = jnp.asarray(sparsities[path], jnp.float32)
    share = share.reshape(*share.shape, *(1,) * (len(stack) - share.ndim))
    parts = (
      w.astype(dtype),
      of_inputs.hessian.astype(dtype),
      of_inputs.count > 0,
      jnp.broadcast_to(share, stack),
    )
    values, masks[path], reports[path] = hessians.map_stack(
      lambda parts: one(*parts), parts, stack
    )
    axis = -1 if turned[path] else -2
    flat[path] = _leaf(path, values, masks[path], axis, w.dtype, options)
  _masks.require_left(masks)
  hessians.check_and_tell(name, reports, options.damping, "pruned by magnitude")
  return tree_lib.unflatten(flat)


def _leaf(
  path: str,
  kept: Any,
  mask: jax.Array,
  axis: int,
  dtype: jnp.dtype,
  options: SweptOptions,
) -> Any:
  """The leaf of values `[*stack, I, O]`, or of codes and their grid."""
  fmt = options.number_format
  turn = lambda a: jnp.swapaxes(a, -1, -2) if axis == -1 else a
  if fmt is None:
    values = turn(kept.astype(dtype))
    return _masks.leaf_of(path, values, mask, axis, options, options.share)
  codes, grid = kept
  if not options.packed:
    values = fmt.leaf(codes, grid, axis=axis, dtype=dtype)
    return _masks.leaf_of(path, values, mask, axis, options, options.share)
  # Codes are taken out as numbers, and what is left of them becomes the values.
  pattern = options.build_pattern()
  taken = n_of_m.NOfM.create(codes, mask, keep=pattern.keep, of=pattern.of).values
  around = _masks.leaf_of(path, turn(codes), mask, axis, options, options.share)
  values = fmt.leaf(taken, grid, axis=axis, dtype=dtype)
  return dataclasses.replace(around, values=values)


def _sparsities(
  weights: Mapping[str, jax.Array],
  usable: Mapping[str, Any],
  about: Mapping[str, Any],
  options: SweptOptions,
) -> dict[str, Any]:
  """Of each matrix; outliers, for "owl", are those of Wanda's scores."""
  layers, stacked = _masks.layers_of(weights, about)
  scored = {
    path: jnp.abs(w) * jnp.sqrt(usable[path].mean_square)[..., None]
    for path, w in weights.items()
  }
  return _masks.sparsities(scored, options, layers, stacked)
