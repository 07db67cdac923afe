"""Low-rank factors by truncated singular value decomposition.

Source: Eckart and Young 1936: of all matrices of rank R this product is the nearest in
Frobenius norm. Both factors get the square roots of the singular values, so neither
learns faster than the other. Right after "init" this is the spectral initialization of
low-rank layers that train from scratch: Khodak et al. 2021, arXiv:2105.01029, section 3
(their Frobenius decay is not here: weight decay falls on each factor).
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import merged
from effjax.core import config, errors, technique
from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import low_rank

_KINDS = ("matrix", "embedding", "router")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVDOptions:
  """Options of the truncated decomposition.

  Attributes:
    rank: R of every selected matrix; None to go by `keep`.
    keep: share of a matrix's numbers that its factors may hold, above 0 and at most 1;
      R is what fits, at least 1.
  """

  rank: int | None = None
  keep: float = 0.5

  def __post_init__(self):
    config.require(
      self.rank is None or self.rank >= 1, f"rank={self.rank} must be at least 1"
    )
    config.require(
      0 < self.keep <= 1, f"keep={self.keep} must be above 0 and at most 1"
    )

  def rank_of(self, rows: int, columns: int) -> int:
    """R of a matrix `[rows, columns]`."""
    if self.rank is not None:
      return self.rank
    return max(1, int(self.keep * rows * columns / (rows + columns)))


def factorize(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: SVDOptions,
) -> dict[str, Any]:
  """Replaces the selected parameters by `LowRank` leaves; stacks keep their axes.

  Raises:
    InputError: a rank above the smaller side of a matrix; a parameter that is no
      matrix, or is compressed already.
  """
  del stats

  def one(path: str, leaf: Any, spec: Any) -> Any:
    if path not in paths:
      return leaf
    if spec.kind not in _KINDS:
      allowed = ", ".join(_KINDS)
      raise errors.InputError(
        f"svd cannot factorize {path} of kind {spec.kind!r}; it takes {allowed}"
      )
    merged.require("svd", path, leaf)
    if leaf_lib.is_leaf_kind(leaf):
      raise errors.InputError(
        f"{path} is already a {leaf.kind} leaf; start this stage after a plain one"
      )
    rows, columns = leaf.shape[-2:]
    rank = options.rank_of(rows, columns)
    config.require(
      rank <= min(rows, columns),
      f"rank={rank} exceeds the smaller side of {path} [{rows}, {columns}]; choose a "
      f"smaller rank, or leave it out by `where`",
    )
    return low_rank.LowRank.create(*_factors(leaf, rank))

  return tree_lib.map_leaves(one, params, specs)


@functools.partial(jax.jit, static_argnames="rank")
def _factors(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
  """Balanced factors `[*stack, in, R]` and `[*stack, R, out]`."""
  left, values, right = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
  roots = jnp.sqrt(values[..., :rank])
  left = left[..., :rank] * jnp.expand_dims(roots, -2)
  right = jnp.expand_dims(roots, -1) * right[..., :rank, :]
  return left.astype(w.dtype), right.astype(w.dtype)


TECHNIQUE = technique.Transform(fn=factorize, options_cls=SVDOptions)
