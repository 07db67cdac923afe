"""One sweep over the inputs of a matrix: each is fixed, the later ones make up for it.

What second-order quantization and pruning have in common (Frantar et al. 2022,
arXiv:2210.17323, algorithm 1, and 2023, arXiv:2301.00774, algorithm 1; both from the
Optimal Brain Surgeon of Hassibi and Stork 1992). For a matrix W `[I, O]` whose inputs
have the Hessian H = sum x x^T, the squared error of its outputs is
tr((W - Q)^T H (W - Q)). With U the upper Cholesky factor of the inverse, H^-1 = U^T U,
the inputs i = 0, 1, ... are fixed one after the other:

    Q_i = keep(W_i);  E_i = (W_i - Q_i) / U_ii;  W_j -= U_ij E_i  for all j > i

which moves the rest to where the error is least, given what is fixed. The error is the
sum of E^2. Updates of inputs beyond a block of B are put off to its end. Here a row of
W is an input; the papers write W^T, where it is a column.

Both loops are scans, so that compile time does not depend on the sizes, and all is pure
arrays: `jax.vmap` serves stacked layers and experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST
# How often the damping is raised before the Hessian is given up, each time tenfold.
_ESCALATIONS = 5
_LEAST_RAISED = 1e-4


class Block(NamedTuple):
  """What a sweep shows where a block begins; B inputs in it.

  Attributes:
    index: number of the block, an int32 scalar.
    rows: its weights `[B, O]`, with all earlier inputs made up for.
    factor_diagonal: U_ii of its inputs, `[B]`. Setting w_i to zero costs
      `(w_i / U_ii)^2`.
  """

  index: jax.Array
  rows: jax.Array
  factor_diagonal: jax.Array


class Swept(NamedTuple):
  """What a sweep made.

  Attributes:
    kept: `[I, O]`, the values chosen.
    parts: what `keep` gave beside them, stacked, `[I, ...]`.
    blocks: what `start` gave, stacked, `[I / B, ...]`.
    inner_blocks: what `start_inner` gave, stacked.
    loss: tr((W - Q)^T H (W - Q)), with H as it was factored, a scalar.
  """

  kept: jax.Array
  parts: Any
  blocks: Any
  inner_blocks: Any
  loss: jax.Array


class Inner(NamedTuple):
  """Smaller blocks inside the blocks of a sweep.

  Attributes:
    size: inputs of one, a divisor of B.
    start: `start(started, block)`, called where one begins, with what the `start` of
      the block around it returned; what it returns, any arrays, goes to `keep` too.
  """

  size: int
  start: Callable[[Any, Block], Any]


class Factor(NamedTuple):
  """The factor of an inverse Hessian.

  Attributes:
    upper: U `[I, I]`, upper triangular, H^-1 = U^T U with H damped; not finite if no
      damping helped.
    dead: bool `[I]`, inputs that were always zero; their weights may be anything.
    damping: what was used, a share of the mean of H's diagonal, a scalar.
  """

  upper: jax.Array
  dead: jax.Array
  damping: jax.Array


def block_size(in_dim: int, most: int) -> int:
  """The largest divisor of `in_dim` that is at most `most`."""
  return max(n for n in range(1, min(in_dim, most) + 1) if in_dim % n == 0)


def sweep(
  w: jax.Array,
  upper: jax.Array,
  block: int,
  start: Callable[[Block], Any],
  keep: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]],
  inner: Inner | None = None,
) -> Swept:
  """Fixes the inputs of a matrix in order.

  Args:
    w: `[I, O]`, floating.
    upper: U `[I, I]`, see `inverse_factor`.
    block: B, a divisor of I (see `block_size`).
    start: called where a block begins; what it returns, any arrays, goes to `keep`.
    keep: `keep(started, row, i)` with the row `[O]` as it stands and i its number in
      the matrix: the values `[O]` it keeps, and any arrays to be stacked. With `inner`,
      `started` is the pair of what both starts returned.
    inner: what begins more often than blocks do.
  """
  in_dim = w.shape[0]
  num_blocks = in_dim // block
  size = inner.size if inner else block
  diagonal = jnp.diagonal(upper)

  def about(rows: jax.Array, first: jax.Array, count: int) -> Block:
    factor_diagonal = jax.lax.dynamic_slice_in_dim(diagonal, first, count)
    return Block(first // count, rows, factor_diagonal)

  def fix_block(carry: Any, b: jax.Array) -> tuple[Any, Any]:
    w, loss = carry
    first = b * block
    rows = jax.lax.dynamic_slice_in_dim(w, first, block)
    factor = jax.lax.dynamic_slice_in_dim(upper, first, block)  # U of it, [B, I]
    within = jax.lax.dynamic_slice_in_dim(factor, first, block, axis=1)
    outer = start(about(rows, first, block))

    def fix_inner(rows: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
      started, own = outer, ()
      if inner:
        here = jax.lax.dynamic_slice_in_dim(rows, b * size, size)
        own = inner.start(outer, about(here, first + b * size, size))
        started = outer, own

      def fix_input(rows: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
        kept, part = keep(started, rows[i], first + i)
        error = (rows[i] - kept) / within[i, i]
        # U is zero left of its diagonal: what was fixed before stays.
        return rows - within[i][:, None] * error[None], (kept, part, error)

      rows, made = jax.lax.scan(fix_input, rows, b * size + jnp.arange(size))
      return rows, (*made, own)

    _, made = jax.lax.scan(fix_inner, rows, jnp.arange(block // size))
    kept, part, errors, own = made
    errors = errors.reshape(rows.shape)
    # Earlier inputs stay again, and those of the block are not read any more.
    w -= jnp.matmul(factor.T, errors, precision=_HIGHEST)
    return (w, loss + jnp.sum(jnp.square(errors))), (kept, part, outer, own)

  (_, loss), (kept, parts, blocks, owns) = jax.lax.scan(
    fix_block, (w, jnp.zeros((), w.dtype)), jnp.arange(num_blocks)
  )
  rows_of = lambda x: x.reshape(in_dim, *x.shape[3:])
  owns_of = lambda x: x.reshape(in_dim // size, *x.shape[2:])
  parts, owns = jax.tree.map(rows_of, parts), jax.tree.map(owns_of, owns)
  return Swept(rows_of(kept), parts, blocks, owns, loss)


def inverse_factor(hessian: jax.Array, damping: float) -> Factor:
  """The upper Cholesky factor of the inverse of a damped Hessian.

  `damping` times the mean of the diagonal is added to it, and ten times as much, up to
  five times over, where H is not positive definite in this precision. The factor is the
  inverse of one of H itself, in reversed order, which loses less than inverting first.
  Inputs that were always zero get a 1 on the diagonal and take no part in the mean
  (deviation: in the papers' code they do), so the scale of H does not matter.

  Args:
    hessian: H `[I, I]`, symmetric, float32 or float64.
    damping: share of the mean of the diagonal, not negative.
  """
  in_dim, dtype = hessian.shape[0], hessian.dtype
  diagonal = jnp.diagonal(hessian)
  dead = diagonal == 0
  mean = jnp.sum(diagonal) / jnp.maximum(in_dim - jnp.sum(dead), 1)
  eye = jnp.eye(in_dim, dtype=dtype)
  h = hessian + jnp.diag(dead.astype(dtype))

  def factor(damping: jax.Array) -> jax.Array:
    # Not symmetrized, H being so: only one half of it is read.
    reversed_h = (h + damping * mean * eye)[::-1, ::-1]
    lower = jax.lax.linalg.cholesky(reversed_h, symmetrize_input=False)
    inverse = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    return inverse[::-1, ::-1]

  def failed(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    upper, _, times = carry
    return ~jnp.all(jnp.isfinite(upper)) & (times <= _ESCALATIONS)

  def attempt(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    _, used, times = carry
    raised = jnp.maximum(10 * used, _LEAST_RAISED)
    used = jnp.where(times == 0, used, raised)
    return factor(used), used, times + 1

  # The first attempt is a turn of the loop, so that its program exists once.
  nothing = jnp.full_like(hessian, jnp.nan)
  start = (nothing, jnp.asarray(damping, dtype), jnp.zeros((), jnp.int32))
  upper, used, _ = jax.lax.while_loop(failed, attempt, start)
  return Factor(upper, dead, used)
