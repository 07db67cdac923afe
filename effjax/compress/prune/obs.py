"""Optimal Brain Surgeon: one weight at a time, and all others make up for it.

Source: Hassibi and Stork 1992, eq. 5, on the squared error of a layer's outputs, where
each output has the same Hessian and is pruned by itself (Frantar and Alistarh 2022,
arXiv:2208.11580, algorithm 1): of the weights that are left the one with the least
w_q^2 / [H^-1]_qq goes, the others change by -w_q / [H^-1]_qq H^-1_:q, and input q is
taken out of H^-1 by one step of Gaussian elimination.

Deviation: every output loses the same share (theirs compares outputs). The cost is I^3
a pruned output: for narrow layers, and to judge SparseGPT by, which fixes an order of
inputs and shares one factor among all outputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from effjax.compress import hessians
from effjax.compress.prune import _swept
from effjax.core import config
from effjax.ops.matmul import column_sweep


@dataclasses.dataclass(frozen=True, kw_only=True)
class OBSOptions(_swept.SweptOptions):
  """Options of OBS.

  Attributes:
    pattern: "unstructured".
    within: "output".
  """

  within: str = "output"

  def __post_init__(self):
    config.require(
      self.pattern == "unstructured" and self.within == "output",
      "obs prunes single weights, each output by itself; leave pattern and within out",
    )
    super().__post_init__()


@functools.partial(jax.jit, static_argnames="options")
def prune_matrix(
  w: jax.Array,
  hessian: jax.Array,
  used: jax.Array,
  sparsity: jax.Array,
  *,
  options: OBSOptions,
) -> tuple[jax.Array, jax.Array, hessians.Report]:
  """OBS of every output of one matrix, as pure arrays.

  Args:
    w: `[I, O]`, float32 or float64.
    hessian: `[I, I]` of the dtype of w.
    used: whether there is a Hessian, a bool scalar; else magnitudes decide.
    sparsity: share to prune, a scalar.
    options: of the stage.

  Returns:
    Values with zeros, the mask, and a report.
  """
  in_dim, out_dim = w.shape
  finite = jnp.all(jnp.isfinite(hessian))
  hessian = jnp.where(used, hessian, jnp.eye(in_dim, dtype=hessian.dtype))
  factor = column_sweep.inverse_factor(hessian, options.damping)
  w = jnp.where(factor.dead[:, None], 0, w)
  inverse = jnp.matmul(
    factor.upper.T, factor.upper, precision=jax.lax.Precision.HIGHEST
  )
  lost = jnp.round(sparsity * in_dim).astype(jnp.int32)
  one = lambda w: prune_output(w, inverse, lost)
  most = hessians.TOGETHER_BYTES // (in_dim**2 * w.dtype.itemsize)
  together = column_sweep.block_size(out_dim, max(most, 1))
  values, mask, losses = jax.lax.map(one, w.T, batch_size=together)
  report = hessians.Report(used, finite, factor.damping, jnp.sum(losses))
  return values.T, mask.T, report


def prune_output(
  w: jax.Array, inverse: jax.Array, lost: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """OBS of the weights `[I]` of one output.

  Args:
    w: its weights.
    inverse: H^-1 `[I, I]`.
    lost: how many go, an int32 scalar.

  Returns:
    The weights, the mask of those left, and the rise of w^T H w, a scalar.
  """

  def step(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    w, inverse, mask, loss = carry
    diagonal = jnp.where(mask, jnp.diagonal(inverse), 1)
    cost = jnp.where(mask, jnp.square(w) / diagonal, jnp.inf)
    q = jnp.argmin(cost)
    along = inverse[:, q] / diagonal[q]
    # Of what is pruned before, `inverse` is zero up to rounding: it stays exactly so.
    mask = mask.at[q].set(False)
    moved = jnp.where(mask, w - w[q] * along, 0)
    return moved, inverse - along[:, None] * inverse[q][None], mask, loss + cost[q]

  start = (w, inverse, jnp.ones(w.shape, bool), jnp.zeros((), w.dtype))
  w, _, mask, loss = jax.lax.fori_loop(0, lost, step, start)
  return w, mask, loss


TECHNIQUE = _swept.transform("obs", prune_matrix, OBSOptions)
