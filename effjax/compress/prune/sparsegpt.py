"""SparseGPT: each input's weights are pruned, and the later ones make up for it.

With `quantize` what stays is rounded in the same sweep, and later inputs make up for
both errors (section 3.5): SparseGPT and GPTQ at once. On random weights with
correlated inputs (eight seeds, half pruned) a layer loses about as much as with GPTQ
after SparseGPT, 0.6 to 1.2 times by bits, `block` and seed, and less than with rounding
to nearest after it: 0.9 times with 4 bits, 0.65 with 3, 0.45 with 2, on average.

Source: Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1. Inputs are taken in
order; when a block of B of them is reached, those of its weights with the least
w^2 / [U_ii]^2 are chosen, an equal share of every block, over all outputs together;
of "N:M" the choice is made anew in every group of M, for each output. U is that of
ops.matmul.column_sweep, which this shares with GPTQ.

Deviations: the number chosen in a block is the nearest one to its share (in the
authors' code it is rounded down and one more), and dead inputs take no part in the mean
that the damping is a share of. An expert that was given no token is pruned by
magnitude, and the log names it. `damping` and the Hessians are as for GPTQ. Groups of
inputs with a scale have it fitted when they are reached, to what stays of them; where
the choice is made more often ("2:4"), and of one scale an output, to all weights (in
the authors' code there is only the latter).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import hessians, swept_grids
from effjax.compress.prune import _pattern, _swept
from effjax.compress.quantize import rtn
from effjax.core import config
from effjax.ops.matmul import column_sweep
from effjax.ops.sparsity import selection
from effjax.weights.formats import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPTOptions(_swept.SweptOptions):
  """Options of SparseGPT.

  Attributes:
    pattern: "unstructured" or "N:M".
    block: most inputs that are chosen from together, B (128 in the paper); the largest
      number up to it that divides the inputs, and begins where groups with a scale do.
    quantize: a format and its options, as for rtn, that what stays is rounded to; None
      to leave it as it is.
  """

  block: int = 128
  quantize: rtn.RTNOptions | None = None

  def __post_init__(self):
    super().__post_init__()
    config.require(self.block > 0, f"block={self.block} must be positive")
    config.require(
      self.pattern == "unstructured" or bool(self.build_pattern().of),
      f"sparsegpt takes the patterns unstructured and N:M, not {self.pattern}",
    )
    config.require(
      self.within == "matrix",
      "sparsegpt compares the weights of all outputs of a block; leave within out",
    )
    config.require(
      self.quantize is None or self.quantize.activations in (None, "none"),
      "a pruned weight is multiplied dense; quantize it with activations='none'",
    )

  def size_of(self, in_dim: int) -> int:
    """Inputs of a matrix that are chosen from together.

    Raises:
      InputError: groups with a scale do not divide the inputs, or do not begin where
        those of an "N:M" pattern do.
    """
    of = self.build_pattern().of
    if self.quantize is None:
      return of or column_sweep.block_size(in_dim, self.block)
    fmt = self.quantize.build()
    group = fmt.group_of(in_dim)
    static = fmt.static_grids or group == in_dim
    if of:
      config.require(
        not self.packed or group % of == 0,
        f"groups of {group} inputs with a scale do not hold as many of pattern "
        f"{self.pattern} each: packed needs a multiple of {of}",
      )
      config.require(
        static or group % of == 0 or of % group == 0,
        f"groups of {group} inputs with a scale do not begin where those of pattern "
        f"{self.pattern} do: one must be a multiple of the other",
      )
      return of
    if static:
      return column_sweep.block_size(in_dim, self.block)
    return swept_grids.choice_size(in_dim, group, self.block)

  def check_inputs(self, in_dim: int) -> None:
    """See size_of."""
    self.size_of(in_dim)

  @property
  def number_format(self) -> base.Format | None:
    """That of what stays."""
    return None if self.quantize is None else self.quantize.build()


@functools.partial(jax.jit, static_argnames="options")
def prune_matrix(
  w: jax.Array,
  hessian: jax.Array,
  used: jax.Array,
  sparsity: jax.Array,
  *,
  options: SparseGPTOptions,
) -> tuple[Any, jax.Array, hessians.Report]:
  """SparseGPT of one matrix, as pure arrays.

  Args:
    w: `[I, O]`, float32 or float64.
    hessian: `[I, I]` of the dtype of w.
    used: whether there is a Hessian, a bool scalar; else magnitudes decide.
    sparsity: share to prune, a scalar; not read for "N:M".
    options: of the stage.

  Returns:
    Values with zeros, or with `quantize` codes `[I, O]` and their grid; the mask, and a
    report.
  """
  in_dim, out_dim = w.shape
  pattern = options.build_pattern()
  finite = jnp.all(jnp.isfinite(hessian))
  hessian = jnp.where(used, hessian, jnp.eye(in_dim, dtype=hessian.dtype))
  factor = column_sweep.inverse_factor(hessian, options.damping)
  w = jnp.where(factor.dead[:, None], 0, w)
  size = options.size_of(in_dim)
  lost = jnp.round(sparsity * (size * out_dim)).astype(jnp.int32)

  def choose(block: column_sweep.Block) -> jax.Array:
    cost = jnp.square(block.rows / block.factor_diagonal[:, None])
    if pattern.of:
      return _pattern.keep_n_of_m(cost, pattern)
    return selection.keep_largest([cost], lost)[0]

  def keep(
    mask: jax.Array, row: jax.Array, i: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    return jnp.where(mask[i % size], row, 0), mask[i % size]

  if options.quantize is None:
    swept = column_sweep.sweep(w, factor.upper, size, choose, keep)
    kept, mask = swept.kept, swept.parts
  else:
    swept = swept_grids.sweep(
      options.number_format,
      w,
      factor.upper,
      range=options.quantize.range,
      choice=swept_grids.Choice(size, choose),
    )
    kept, mask = (swept.codes, swept.grid), swept.mask
  report = hessians.Report(used, finite, factor.damping, swept.loss)
  return kept, mask, report


TECHNIQUE = _swept.transform("sparsegpt", prune_matrix, SparseGPTOptions)
