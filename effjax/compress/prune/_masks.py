"""From scores to pruned parameters: what every kind of score shares.

A score says how much a weight matters; the pattern which weights go together
(`_pattern`), and the budget how many go where (`_budget`). Any three combine.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.compress import merged
from effjax.compress.prune import _budget, _pattern
from effjax.core import config, errors
from effjax.core import tree as tree_lib
from effjax.ops.sparsity import amounts, selection
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs
from effjax.weights.leaves import adapted, block_sparse, masked, n_of_m

KINDS = ("matrix", "embedding")
WITHIN = ("matrix", "output")
DEFAULT_SPARSITY = 0.5
# `score(path, w)`: of a matrix [*stack, I, O], or of an embedding turned so.
Score = Callable[[str, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneOptions:
  """Options of every transform that prunes by scores.

  Attributes:
    sparsity: share of the selected weights to prune, in [0, 1); None for one half, or
      for what an "N:M" pattern says.
    pattern: "unstructured", "N:M" (N of M inputs stay), "BxC" (blocks of B inputs and
      C outputs), "rows" (inputs) or "columns" (outputs).
    budget: "global", "uniform", "erk" or "owl": where how much is pruned.
    within: whether scores are compared in all of a "matrix" or for each "output" by
      itself, in columns of blocks for a pattern of them; the latter with another
      budget than "global".
    packed: whether only what stays is held, and its places: of an "N:M" pattern (leaf
      n_of_m), or of blocks with within="output" (leaf block_sparse); else the whole
      weight is, under a mask, until the transform `pack` takes it away.
    again: takes what is masked already, of which no entry comes back: `sparsity` then
      counts those that are gone (rounds of iterative pruning).
  """

  sparsity: float | None = None
  pattern: str = "unstructured"
  budget: str = "global"
  within: str = "matrix"
  packed: bool = False
  again: bool = False

  def __post_init__(self):
    pattern = self.build_pattern()
    _budget.check(self.budget, self.share)
    if self.within not in WITHIN:
      raise errors.unknown("within", self.within, WITHIN)
    fixed = pattern.fixed_sparsity
    config.require(
      fixed is None or self.sparsity is None or abs(self.sparsity - fixed) < 1e-6,
      f"pattern {self.pattern} prunes {fixed:g} of the weights, not sparsity="
      f"{self.sparsity}; leave sparsity out"
      if fixed is not None
      else "",
    )
    config.require(
      self.within == "matrix" or (pattern.has_outputs and self.budget != "global"),
      f"within='output' compares what is of one output, with a budget for each matrix; "
      f"not with pattern={self.pattern!r} and budget={self.budget!r}",
    )
    config.require(
      not (self.again and self.packed),
      "again=True and packed=True: what is masked cannot be packed in the same stage",
    )
    # As many in each column, and a number that is known before anything is scored.
    even = self.within == "output" and self.budget in ("uniform", "erk")
    config.require(
      not self.packed or fixed is not None or (pattern.is_blocks and even),
      "packed=True takes a pattern N:M, or BxC with within='output' and budget "
      f"'uniform' or 'erk'; not pattern={self.pattern!r}, within={self.within!r}, "
      f"budget={self.budget!r}",
    )

  def build_pattern(self) -> _pattern.Pattern:
    """The pattern."""
    return _pattern.parse(self.pattern)

  @property
  def share(self) -> float:
    """The share of weights to prune."""
    fixed = self.build_pattern().fixed_sparsity
    if fixed is not None:
      return fixed
    return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity


def prune(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: Collection[str],
  name: str,
  score: Score,
  options: PruneOptions,
) -> dict[str, Any]:
  """The tree with pruned leaves in place of the selected parameters.

  They are `Masked` over the values there are, or with `packed` hold what stays. Of an
  adapted parameter the sum is scored, and masked: merging keeps the zeros (merge_lora).

  Args:
    params, specs: the tree.
    paths: of the selected parameters.
    name: of the transform, for messages.
    score: of a parameter's weights, in the shape it gets; the largest stay.
    options: of the transform.

  Raises:
    InputError: a parameter is of another kind, pruned already or not finite, a pattern
      does not divide it, or nothing of a matrix would be left.
  """
  flat, about = tree_lib.flatten(params), tree_lib.flatten(specs)
  scores: dict[str, jax.Array] = {}
  turned: set[str] = set()
  before: dict[str, jax.Array] = {}
  for path in sorted(paths):
    leaf, kind = flat[path], about[path].kind
    if kind not in KINDS:
      raise errors.InputError(
        f"{name} cannot prune {path} of kind {kind!r}; it takes {', '.join(KINDS)}"
      )
    if options.packed:
      merged.require(f"{name} with packed=True", path, leaf)
    old = _open_mask(path, leaf, options)
    w = verbs.dense(leaf)
    if kind == "embedding":
      turned.add(path)
      w = jnp.swapaxes(w, -1, -2)
    try:
      scores[path] = score(path, w)
    except errors.InputError as error:
      raise errors.InputError(f"{path}: {error}") from None
    if old is not None:
      before[path] = jnp.swapaxes(old, -1, -2) if kind == "embedding" else old
      # No score is below 0: what is gone goes first.
      scores[path] = jnp.where(before[path], scores[path], 0)
      flat[path] = leaf.values
  layers, stacked = layers_of(scores, about)
  masks = choose(scores, options, layers, stacked)
  masks |= {path: masks[path] & old for path, old in before.items()}
  shares = {}
  if options.packed and options.budget == "erk":
    shares = sparsities(scores, options, layers, stacked)
  _require_finite(scores)
  require_left(masks)
  for path, mask in masks.items():
    axis = -1 if path in turned else -2
    share = shares.get(path, options.share)
    flat[path] = leaf_of(path, flat[path], mask, axis, options, share)
  return tree_lib.unflatten(flat)


def _open_mask(path: str, leaf: Any, options: PruneOptions) -> jax.Array | None:
  """The mask of a parameter that may be pruned further, None if it has none."""
  if not _is_pruned(leaf):
    return None
  if isinstance(leaf, masked.Masked) and leaf.is_array:
    if options.again:
      return leaf.mask()
    hint = ", or prune it further with again=True"
  else:
    hint = ""
  raise errors.InputError(
    f"{path} is already pruned; start after an earlier stage{hint}"
  )


def _is_pruned(leaf: Any) -> bool:
  """Whether a parameter is pruned, or the base of its adapters is."""
  base = leaf.base if isinstance(leaf, adapted.Adapted) else leaf
  return leaf_lib.is_leaf_kind(base) and base.pruned


def leaf_of(
  path: str,
  values: Any,
  mask: jax.Array,
  axis: int,
  options: PruneOptions,
  share: float,
) -> Any:
  """The leaf of a pruned parameter.

  Args:
    path: of it, for messages.
    values: an array or a leaf, of the parameter's shape.
    mask: `[*stack, I, O]`.
    axis: where the parameter has its inputs, -2, or -1 for an embedding.
    options: of the transform.
    share: of its weights that the budget prunes.

  Raises:
    InputError: a leaf is to be packed, or rounds its activations.
  """
  in_dim, out_dim = mask.shape[-2:]
  activations = getattr(values, "activations", "none")
  if activations != "none":
    raise errors.InputError(
      f"{path} is multiplied with {activations} activations, and under a mask would be "
      "with floats; quantize it with activations='none'"
    )
  mask = jnp.swapaxes(mask, -1, -2) if axis == -1 else mask
  if not options.packed:
    return masked.Masked.create(values, mask)
  if leaf_lib.is_leaf_kind(values):
    raise errors.InputError(
      f"{path} is a {values.kind} leaf, of which nothing can be taken out; prune it "
      "packed before, or with packed=False"
    )
  pattern = options.build_pattern()
  if pattern.is_blocks:
    block = pattern.unit(in_dim, out_dim)
    rows = in_dim // block[0]
    count = rows - int(_lost(share, rows))
    return block_sparse.BlockSparse.create(values, mask, block, count, axis=axis)
  return n_of_m.NOfM.create(values, mask, keep=pattern.keep, of=pattern.of, axis=axis)


def choose(
  scores: Mapping[str, jax.Array],
  options: PruneOptions,
  layers: Mapping[str, str],
  stacked: Collection[str],
) -> dict[str, jax.Array]:
  """Masks of matrices `[*stack, I, O]` by their scores.

  Args:
    scores: by path.
    options: of the transform.
    layers: the layer of each path, for the budget "owl".
    stacked: paths whose first axis is one of layers.

  Raises:
    InputError: the pattern does not divide a matrix; its path is named.
  """
  pattern = options.build_pattern()
  units = {}
  for path, s in scores.items():
    try:
      units[path] = _pattern.unit_scores(s, pattern)
    except errors.InputError as error:
      raise errors.InputError(f"{path}: {error}") from None
  if pattern.of:
    return {path: _pattern.keep_n_of_m(s, pattern) for path, s in scores.items()}
  if options.budget == "global":
    total = sum(u.size for u in units.values())
    kept = selection.keep_largest(list(units.values()), round(options.share * total))
    masks = dict(zip(units, kept, strict=True))
  else:
    shares = sparsities(scores, options, layers, stacked)
    masks = {path: _keep(u, shares[path], options.within) for path, u in units.items()}
  return {path: _pattern.spread(m, scores[path].shape) for path, m in masks.items()}


def layers_of(
  paths: Collection[str], about: Mapping[str, Any]
) -> tuple[dict[str, str], frozenset[str]]:
  """The path of the layer each parameter is in, and which are stacked over layers."""

  def layer(path: str) -> str:
    head, found, tail = path.partition("layer_")
    return head + found + tail.split("/")[0] if found else path

  stacked = frozenset(path for path in paths if "layers" in about[path].stack)
  return {path: layer(path) for path in paths}, stacked


def sparsities(
  scores: Mapping[str, jax.Array],
  options: PruneOptions,
  layers: Mapping[str, str],
  stacked: Collection[str],
) -> dict[str, Any]:
  """The sparsity of each matrix: a number, or one for each layer that is stacked.

  Args:
    scores, options, layers, stacked: see `choose`.
  """
  if options.budget == "erk":
    shapes = {path: s.shape for path, s in scores.items()}
    found = amounts.erk_densities(shapes, options.share)
    return {path: 1 - density for path, density in found.items()}
  if options.budget == "owl":
    shares = {
      path: _budget.outlier_shares(s, path in stacked) for path, s in scores.items()
    }
    sizes = {path: s.size // jnp.size(shares[path]) for path, s in scores.items()}
    return _budget.owl_sparsities(shares, layers, sizes, options.share)
  return dict.fromkeys(scores, options.share)


def _keep(units: jax.Array, sparsity: Any, within: str) -> jax.Array:
  """The mask of units `[*stack, I, O]` of which each matrix loses its share."""
  *stack, rows, cols = units.shape
  each = rows if within == "output" else rows * cols
  lost = _lost(sparsity, each)
  lost = lost.reshape(*lost.shape, *(1,) * (len(stack) - lost.ndim))
  if within == "output":
    by_output = jnp.swapaxes(units, -1, -2)
    return jnp.swapaxes(
      selection.keep_largest_of_each(by_output, lost[..., None]), -1, -2
    )
  flat = units.reshape(*stack, each)
  return selection.keep_largest_of_each(flat, lost).reshape(units.shape)


def _lost(share: Any, count: int) -> jax.Array:
  """How many of `count` units go, int32: the nearest number to their share."""
  with jax.ensure_compile_time_eval():
    return jnp.round(jnp.asarray(share, jnp.float32) * count).astype(jnp.int32)


def _require_finite(scores: Mapping[str, jax.Array]) -> None:
  """Raises InputError for the first parameter with a score that is not finite."""
  finite = {path: jnp.all(jnp.isfinite(s)) for path, s in scores.items()}
  for path, ok in _on_host(finite).items():
    config.require(bool(ok), f"the scores of {path} are not all finite")


def require_left(masks: Mapping[str, jax.Array]) -> None:
  """Raises InputError for the first matrix `[*stack, I, O]` with nothing left."""
  left = {path: jnp.any(mask, axis=(-1, -2)) for path, mask in masks.items()}
  for path, some in _on_host(left).items():
    empty = np.argwhere(~np.asarray(some))
    place = f"[{', '.join(map(str, empty[0]))}]" if empty.size and some.ndim else ""
    config.require(
      bool(np.all(some)),
      f"nothing would be left of {path}{place}; ask for less sparsity, or for another "
      "budget than this",
    )


def _on_host(arrays: dict[str, jax.Array]) -> dict[str, Any]:
  """The arrays with their values; none where a plan traces this on shapes."""
  if any(isinstance(a, jax.core.Tracer) for a in arrays.values()):
    return {}
  return jax.device_get(arrays)
