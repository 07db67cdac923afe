"""SparseGPT: each input's weights are pruned, and the later ones make up for it.

Source: Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1. Inputs are taken in
order; when a block of B of them is reached, those of its weights with the least
w^2 / [U_ii]^2 are chosen, an equal share of every block, over all outputs together;
of "N:M" the choice is made anew in every group of M, for each output. U is that of
ops.matmul.column_sweep, which this shares with GPTQ.

Deviations: the number chosen in a block is the nearest one to its share (in the
authors' code it is rounded down and one more), and dead inputs take no part in the mean
that the damping is a share of. An expert that was given no token is pruned by
magnitude, and the log names it. `damping` and the Hessians are as for GPTQ.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from effjax.compress import hessians
from effjax.compress.prune import _pattern, _swept
from effjax.core import config
from effjax.ops.matmul import column_sweep
from effjax.ops.sparsity import selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPTOptions(_swept.SweptOptions):
  """Options of SparseGPT.

  Attributes:
    pattern: "unstructured" or "N:M".
    block: most inputs that are chosen from together, B (128 in the paper); the largest
      number up to it that divides the inputs.
  """

  block: int = 128

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


@functools.partial(jax.jit, static_argnames="options")
def prune_matrix(
  w: jax.Array,
  hessian: jax.Array,
  used: jax.Array,
  sparsity: jax.Array,
  *,
  options: SparseGPTOptions,
) -> tuple[jax.Array, jax.Array, hessians.Report]:
  """SparseGPT of one matrix, as pure arrays.

  Args:
    w: `[I, O]`, float32 or float64.
    hessian: `[I, I]` of the dtype of w.
    used: whether there is a Hessian, a bool scalar; else magnitudes decide.
    sparsity: share to prune, a scalar; not read for "N:M".
    options: of the stage.

  Returns:
    Values with zeros, the mask, and a report.
  """
  in_dim, out_dim = w.shape
  pattern = options.build_pattern()
  finite = jnp.all(jnp.isfinite(hessian))
  hessian = jnp.where(used, hessian, jnp.eye(in_dim, dtype=hessian.dtype))
  factor = column_sweep.inverse_factor(hessian, options.damping)
  w = jnp.where(factor.dead[:, None], 0, w)
  size = pattern.of or column_sweep.block_size(in_dim, options.block)
  lost = jnp.round(sparsity * (size * out_dim)).astype(jnp.int32)

  def start(block: column_sweep.Block) -> jax.Array:
    cost = jnp.square(block.rows / block.factor_diagonal[:, None])
    if pattern.of:
      return _pattern.keep_n_of_m(cost, pattern)
    return selection.keep_largest([cost], lost)[0]

  def keep(
    mask: jax.Array, row: jax.Array, i: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    return jnp.where(mask[i % size], row, 0), mask[i % size]

  swept = column_sweep.sweep(w, factor.upper, size, start, keep)
  report = hessians.Report(used, finite, factor.damping, swept.loss)
  return swept.kept, swept.parts, report


TECHNIQUE = _swept.transform("sparsegpt", prune_matrix, SparseGPTOptions)
