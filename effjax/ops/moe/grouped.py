"""Rows sorted by expert, each times the matrix of its expert and of no other.

`jax.lax.ragged_dot` computes exactly this. It is native on TPUs; elsewhere it takes
every row times the matrix of every expert. `grouped_matmul` calls it on a TPU, a kernel
of `grouped_triton` on a GPU, and everywhere else takes windows: a group is split evenly
into windows of at most `block` rows, whose sizes are rounded up to whole parts of a
block, so half a part is wasted on average and an empty group costs nothing. All windows
of one size run in one loop, whose products have static shapes; rows a window has beyond
its group are computed and not written.

Letters: M rows of a window, W windows, S sizes of windows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from effjax.core import config, counting, shard
from effjax.ops.moe import grouped_triton

# Most rows of a window, measured on two CPU cores: products of fewer rows are slow (one
# of 64 takes 1.6 times as long a row as one of 256), windows of more waste more.
_BLOCK = 320
_PARTS = 10
# Rows a window may have by default.
WINDOW_SIZES = tuple(range(_BLOCK // _PARTS, _BLOCK + 1, _BLOCK // _PARTS))


class Choice(NamedTuple):
  """What computes a grouped product and why, as the end of "because ..."."""

  name: str
  reason: str


def choose(platform: str, dtype: DTypeLike = jnp.float32) -> Choice:
  """Which form runs on a platform, as JAX names it, for rows of a dtype."""
  if platform == "tpu":
    return Choice("ragged_dot", "TPUs multiply each row by its own expert only")
  dense = f"on {platform} ragged_dot multiplies every row by the matrix of every expert"
  if platform != "gpu":
    return Choice("windows", dense)
  name = jnp.dtype(dtype).name
  if name not in grouped_triton.DTYPES:
    return Choice("windows", f"{dense}, and the kernel takes no {name}")
  return Choice("triton", dense)


def grouped_matmul(
  x_TD: jax.Array,
  w_EDF: jax.Array,
  group_sizes_E: jax.Array,
  *,
  block: int | None = None,
) -> jax.Array:
  """`y[t] = x[t] @ w[group of t]`: `[T, D] x [E, D, F] -> [T, F]`.

  Args:
    x_TD: rows of group 0, then of group 1, and so on.
    w_EDF: a matrix a group, in the dtype of x.
    group_sizes_E: rows of each group, int32; rows past their sum give zeros, and their
      gradients are zero.
    block: takes windows on every platform, of at most so many rows (320 where it is
      None); does not change results.

  Raises:
    InputError: a block under 1.
  """
  if block is None:
    name = choose(shard.platform(), x_TD.dtype).name
    if name == "ragged_dot" and len(w_EDF) == 1:
      own_T1 = jnp.arange(len(x_TD))[:, None] < group_sizes_E[0]
      return jnp.where(own_T1, x_TD @ w_EDF[0], 0)
    if name == "ragged_dot":
      return lax.ragged_dot(x_TD, w_EDF, group_sizes_E)
    if counting.active():
      return _countable(x_TD, w_EDF, group_sizes_E)
    if name == "triton":
      return grouped_triton.grouped_matmul(x_TD, w_EDF, group_sizes_E)
    block = _BLOCK
  config.require(block >= 1, f"block={block} must be at least 1")
  return _grouped(_rows(block), x_TD, w_EDF, group_sizes_E)


def grouped_codes(
  x_TD: jax.Array,
  w: jax.Array,
  group_sizes_E: jax.Array,
  *,
  out_first: bool,
  dtype: DTypeLike,
) -> jax.Array:
  """`grouped_matmul` of codes, by windows on every platform; it has no gradient.

  Args:
    x_TD: int8, or floats of 8 bits.
    w: codes `[E, D, F]`, or `[E, F, D]` if `out_first`.
    group_sizes_E: see `grouped_matmul`.
    out_first: the matrices are held with their output axis first.
    dtype: of the sums and the result: int32, or float32.
  """
  if counting.active():
    w_EDF = jnp.swapaxes(w, -1, -2) if out_first else w
    return _countable(x_TD, w_EDF, group_sizes_E, dtype)
  return _product(_rows(_BLOCK), x_TD, w, group_sizes_E, int(out_first), dtype)


def window_rows(group_sizes: Sequence[int], block: int = _BLOCK) -> list[int]:
  """Rows of each window that is multiplied for groups of these sizes.

  Args:
    group_sizes: rows of each group.
    block: most rows of a window, not more than there are rows in all.
  """
  block, part = _rows(block)
  up = lambda rows: -(-rows // part) * part
  found = []
  for size in map(int, group_sizes):
    count = max(1, -(-size // block))
    even = up(-(-size // count))
    found += [even] * (count - 1) + [up(size - (count - 1) * even)]
  return [rows for rows in found if rows]


class _Rows(NamedTuple):
  """Rows of windows: the most, and by how many sizes differ."""

  block: int
  part: int

  def sizes(self, num_rows: int) -> list[int]:
    """Of windows, none larger than all rows: each size is compiled."""
    sizes = range(self.part, self.block + 1, self.part)
    return [min(size, num_rows) for size in sizes if size < num_rows + self.part]


def _rows(block: int) -> _Rows:
  part = max(1, block // _PARTS)
  return _Rows(block // part * part, part)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(
  rows: _Rows, x_TD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array
) -> jax.Array:
  return _product(rows, x_TD, w_EDF, sizes_E, 0)


def _forward(
  rows: _Rows, x_TD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return _product(rows, x_TD, w_EDF, sizes_E, 0), (x_TD, w_EDF, sizes_E)


def _backward(
  rows: _Rows, residuals: tuple[jax.Array, ...], dy_TF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  x_TD, w_EDF, sizes_E = residuals
  dx_TD = _product(rows, dy_TF, w_EDF, sizes_E, 1)
  return dx_TD, _outer(rows, x_TD, dy_TF, sizes_E).astype(w_EDF.dtype), None


_grouped.defvjp(_forward, _backward)


def _product(
  rows: _Rows,
  x_TD: jax.Array,
  w_EDF: jax.Array,
  sizes_E: jax.Array,
  axis: int,
  dtype: DTypeLike | None = None,
) -> jax.Array:
  """The grouped product, contracting `axis` of each matrix; by default in x's dtype."""

  def body(window: _Window, y_TF: jax.Array) -> jax.Array:
    w_DF = lax.dynamic_index_in_dim(w_EDF, window.expert, keepdims=False)
    y_MF = lax.dot_general(
      window.rows_of(x_TD),
      w_DF,
      (((1,), (axis,)), ((), ())),
      preferred_element_type=dtype,
    )
    y_MF = jnp.where(window.own_M1, y_MF, window.rows_of(y_TF))
    return lax.dynamic_update_slice_in_dim(y_TF, y_MF, window.start, 0)

  y_TF = jnp.zeros((x_TD.shape[0], w_EDF.shape[2 - axis]), dtype or x_TD.dtype)
  return _for_windows(rows, x_TD.shape[0], sizes_E, body, y_TF)


def _outer(
  rows: _Rows, x_TD: jax.Array, dy_TF: jax.Array, sizes_E: jax.Array
) -> jax.Array:
  """`sum_t x[t] dy[t]^T` over the rows of each group, `[E, D, F]` float32."""

  def body(window: _Window, dw_EDF: jax.Array) -> jax.Array:
    x_MD, dy_MF = window.rows_of(x_TD), window.rows_of(dy_TF)
    dw_DF = lax.dot_general(
      x_MD,
      jnp.where(window.own_M1, dy_MF, 0),
      (((0,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    dw_DF += lax.dynamic_index_in_dim(dw_EDF, window.expert, keepdims=False)
    return lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, window.expert, 0)

  shape = (sizes_E.shape[0], x_TD.shape[1], dy_TF.shape[1])
  zeros_EDF = jnp.zeros(shape, jnp.float32)
  return _for_windows(rows, x_TD.shape[0], sizes_E, body, zeros_EDF)


class _Window(NamedTuple):
  """A window of `own_M1.shape[0]` rows.

  Attributes:
    expert: its group, scalar int32.
    start: its first row, scalar int32.
    own_M1: which of its rows are of its group and of no window before it.
  """

  expert: jax.Array
  start: jax.Array
  own_M1: jax.Array

  def rows_of(self, array: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, self.start, self.own_M1.shape[0])


def _for_windows(
  rows: _Rows,
  num_rows: int,
  sizes_E: jax.Array,
  body: Callable[[_Window, jax.Array], jax.Array],
  carry: jax.Array,
) -> jax.Array:
  """`carry = body(window, carry)` for the windows of every group, the smallest first.

  A loop per size and no branch within: a `switch` would copy the carry or its products.
  """
  sizes = rows.sizes(num_rows)
  ends_E = jnp.cumsum(sizes_E)
  expert_W, first_W, bounds_S = _windows(rows, len(sizes), num_rows, sizes_E)

  def step(size: int, index: jax.Array, carry: jax.Array) -> jax.Array:
    expert, first = expert_W[index], first_W[index]
    # The last window would reach past the rows: it starts before its own ones.
    start = jnp.minimum(first, num_rows - size)
    row_M1 = start + jnp.arange(size)[:, None]
    own_M1 = (row_M1 >= first) & (row_M1 < ends_E[expert])
    return body(_Window(expert, start, own_M1), carry)

  for index, size in enumerate(sizes):
    carry = lax.fori_loop(
      bounds_S[index], bounds_S[index + 1], functools.partial(step, size), carry
    )
  return carry


def _windows(
  rows: _Rows, num_sizes: int, num_rows: int, sizes_E: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Windows sorted by size: the group and the first row of each, `[W]` int32.

  And where each size begins and the last one ends among them, `[S + 1]`: what lies
  behind that end is no window.
  """
  num_groups = sizes_E.shape[0]
  starts_E = jnp.cumsum(sizes_E) - sizes_E
  counts_E = -(-sizes_E // rows.block)
  even_E = -(-sizes_E // jnp.maximum(counts_E, 1))
  even_E = -(-even_E // rows.part) * rows.part
  last_E = jnp.cumsum(counts_E)
  index_W = jnp.arange(num_rows // rows.block + num_groups)
  expert_W = jnp.searchsorted(last_E, index_W, side="right").astype(jnp.int32)
  expert_W = jnp.minimum(expert_W, num_groups - 1)
  done_W = (index_W - (last_E - counts_E)[expert_W]) * even_E[expert_W]
  left_W = jnp.clip(sizes_E[expert_W] - done_W, 1, even_E[expert_W])
  size_W = jnp.where(index_W < last_E[-1], -(-left_W // rows.part) - 1, num_sizes)
  order_W = jnp.argsort(size_W)
  bounds_S = jnp.searchsorted(size_W[order_W], jnp.arange(num_sizes + 1))
  return expert_W[order_W], (starts_E[expert_W] + done_W)[order_W], bounds_S


def _countable(
  x_TD: jax.Array,
  w_EDF: jax.Array,
  sizes_E: jax.Array,
  dtype: DTypeLike | None = None,
) -> jax.Array:
  """The same product, traced with the rows it would multiply for even groups."""
  num_rows, num_groups = x_TD.shape[0], w_EDF.shape[0]
  share, rest = divmod(num_rows, num_groups)
  even = [share + (expert < rest) for expert in range(num_groups)]
  wasted = sum(window_rows(even)) - num_rows
  x_TD = jnp.pad(x_TD, ((0, wasted), (0, 0)))
  y_TF = lax.ragged_dot(x_TD, w_EDF, sizes_E, preferred_element_type=dtype)
  return y_TF[:num_rows]
