"""GPTQ: each input's weights are rounded, and the later ones make up for the error.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1, with the options of the
authors' code: `act_order` takes inputs in the order of falling H_ii, `static_groups`
fits all grids before. The Hessian is that of calibration, collect=("hessian",), on the
model as it is before the stage. Every format of `effjax list formats` serves.

Deviations: a group's grid is fitted when its first input is reached, with all earlier
errors made up for (in the authors' code with those of earlier blocks); grids are static
with `act_order`, and for a format whose grids depend on one another, since a leaf knows
no order of inputs but its own. Inputs that were always zero take no part in the mean of
the diagonal that the damping is a share of. The damping is raised where the Hessian is
not positive definite, and the log says where. An expert that was given no token at all
is rounded to nearest, and the log names it.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import hessians, swept_grids
from effjax.compress.quantize import _matrices, rtn
from effjax.core import config, errors, select, technique
from effjax.core import tree as tree_lib
from effjax.ops.matmul import column_sweep
from effjax.weights.leaves import block_sparse, masked, n_of_m, rotated


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQOptions(rtn.RTNOptions):
  """Options of GPTQ, beside those of the format (of integers, 4 bits by default).

  Attributes:
    damping: what is added to the Hessian's diagonal, as a share of its mean.
    act_order: whether inputs are taken in the order of falling H_ii.
    static_groups: whether all grids are fitted to the weights as they are before.
    block: most inputs whose updates of the rest are put together; changes only how
      fast it runs. Groups with grids of their own are blocks.
  """

  damping: float = 0.01
  act_order: bool = False
  static_groups: bool = False
  block: int = 128

  def __post_init__(self):
    if self.format == "int" and self.bits is None:
      object.__setattr__(self, "bits", 4)
    super().__post_init__()
    config.require(self.damping >= 0, f"damping={self.damping} must not be negative")
    config.require(self.block > 0, f"block={self.block} must be positive")


def quantize(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: GPTQOptions,
) -> dict[str, Any]:
  """Replaces the selected parameters by leaves of the format, one at a time.

  A `Masked` parameter stays masked, and the rest makes up for its zeros too. For a
  `Rotated` one the inputs are rotated, as its values are.

  Raises:
    InputError: a parameter is low-rank, no matrix, quantized already, or has no Hessian
      that can be used, or one of fewer tokens than it has inputs.
  """
  before, found = tree_lib.flatten(params), tree_lib.flatten(stats or {})
  hessians.require_tokens({path: found[path] for path in paths if path in found})
  reports: dict[str, hessians.Report] = {}

  def one(path: str, w: jax.Array, axis: int) -> Any:
    old = before.get(path)
    if old is None:
      raise errors.InputError(
        "calibration knows the inputs of a matrix, not of the factors of a low-rank "
        "one; quantize it with rtn"
      )
    if isinstance(old, n_of_m.NOfM | block_sparse.BlockSparse):
      raise errors.InputError(
        "gptq goes through all inputs of a matrix, of which this one holds a part; "
        "prune it with packed=False, or quantize it with rtn"
      )
    mask = old.mask() if isinstance(old, masked.Masked) else None
    if mask is not None and axis == -1:
      mask = jnp.swapaxes(mask, -1, -2)
    of_inputs = hessians.usable("gptq", found.get(path), w)
    hessian = of_inputs.hessian
    if isinstance(old, rotated.Rotated):
      hessian = old.rotate_hessian(hessian)
    leaf, reports[path] = _quantize_array(
      w, mask, hessian, of_inputs.count > 0, axis, options
    )
    return leaf

  made = _matrices.replace(params, specs, paths, "gptq", one, options, stats)
  hessians.check_and_tell("gptq", reports, options.damping, "rounded to nearest")
  return made


@functools.partial(jax.jit, static_argnames=("axis", "options"))
def _quantize_array(
  w: jax.Array,
  mask: jax.Array | None,
  hessian: jax.Array,
  used: jax.Array,
  axis: int,
  options: GPTQOptions,
) -> tuple[Any, hessians.Report]:
  """One array, of what is stacked one matrix after the other or some together."""
  dtype = jnp.promote_types(w.dtype, jnp.float32)
  parts = (w.astype(dtype), mask, hessian.astype(dtype), used)
  codes, grid, report = hessians.map_stack(
    lambda parts: quantize_matrix(*parts, options), parts, w.shape[:-2]
  )
  leaf = options.build().leaf(codes, grid, axis=axis, dtype=w.dtype)
  return leaf, report


def quantize_matrix(
  w: jax.Array,
  mask: jax.Array | None,
  hessian: jax.Array,
  used: jax.Array,
  options: GPTQOptions,
) -> tuple[jax.Array, dict[str, jax.Array], hessians.Report]:
  """GPTQ of one matrix, as pure arrays.

  Args:
    w: `[in, out]`, float32 or float64.
    mask: bool like w, what it drops is rounded to zero; or None.
    hessian: `[in, in]` of the dtype of w.
    used: whether there is a Hessian, a bool scalar; else w is rounded to nearest.
    options: of the stage.

  Returns:
    Codes `[in, out]`, the grid of parts `[groups, 1, out]` (see weights.formats.base),
    and a report.
  """
  in_dim = w.shape[0]
  finite = jnp.all(jnp.isfinite(hessian))
  # With this Hessian nothing makes up for anything, and GPTQ is rounding to nearest.
  eye = jnp.eye(in_dim, dtype=hessian.dtype)
  hessian = jnp.where(used, hessian, eye)
  order = None
  if options.act_order:
    order = jnp.argsort(-jnp.diagonal(hessian))
    hessian = hessian[order][:, order]
  factor = column_sweep.inverse_factor(hessian, options.damping)
  # What reorders `order` back is its own order.
  back = None if order is None else jnp.argsort(order)
  dead = factor.dead if back is None else factor.dead[back]
  w = jnp.where(dead[:, None], 0, w)
  swept = swept_grids.sweep(
    options.build(),
    w,
    factor.upper,
    range=options.range,
    static=options.act_order or options.static_groups,
    block=options.block,
    order=order,
    mask=mask,
  )
  codes = swept.codes if back is None else swept.codes[back]
  return codes, swept.grid, hessians.Report(used, finite, factor.damping, swept.loss)


TECHNIQUE = technique.Transform(
  fn=quantize,
  options_cls=GPTQOptions,
  default_where=select.Where(kind=("matrix",)),
  collect=("hessian",),
)
