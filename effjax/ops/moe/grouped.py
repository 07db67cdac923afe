"""Rows sorted by expert, each times the matrix of its expert and of no other.

`jax.lax.ragged_dot` computes exactly this. It is native on TPUs; elsewhere it takes
every row times the matrix of every expert. `grouped_matmul` calls it on a TPU, a kernel
of `grouped_triton` on a GPU, and everywhere else takes windows: an expert multiplies
`block` of its rows at a time, and what is left in one window of as many eighths of a
block as it takes. That window reaches into the next group. Groups are taken in order,
so what was computed for rows of another expert is overwritten by their own; only the
gradient of the matrices needs a mask. An empty group costs nothing, and a sixteenth of
a block is wasted on average.

Letters: M rows of a window, W windows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from effjax.core import config, counting
from effjax.ops.moe import grouped_triton

# Rows of a full window, measured on two CPU cores: a product of few rows is slow, one
# of 64 takes 1.6 times as long a row as one of 256.
_BLOCK = 256
_PARTS = 8
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
    block: takes windows on every platform, a full one of so many rows (256 where it is
      None), rounded up to whole eighths; does not change results.

  Raises:
    InputError: a block under 1.
  """
  if block is None:
    name = choose(jax.default_backend(), x_TD.dtype).name
    if name == "ragged_dot":
      return lax.ragged_dot(x_TD, w_EDF, group_sizes_E)
    if counting.active():
      return _countable(x_TD, w_EDF, group_sizes_E)
    if name == "triton":
      return grouped_triton.grouped_matmul(x_TD, w_EDF, group_sizes_E)
    block = _BLOCK
  config.require(block >= 1, f"block={block} must be at least 1")
  return _grouped(_rows(block, x_TD.shape[0]), x_TD, w_EDF, group_sizes_E)


def window_rows(group_sizes: Sequence[int], block: int = _BLOCK) -> list[int]:
  """Rows of each window that is multiplied for groups of these sizes.

  Args:
    group_sizes: rows of each group.
    block: rows of a full window, not more than there are rows in all.
  """
  part = max(1, block // _PARTS)
  found = []
  for size in map(int, group_sizes):
    found += [block] * (size // block)
    rest = size % block
    found += [-(-rest // part) * part] if rest else []
  return found


class _Rows(NamedTuple):
  """Rows of windows: of a full one, and by how many the smaller ones differ."""

  block: int
  part: int


def _rows(block: int, num_rows: int) -> _Rows:
  """Whole parts, and no window larger than all rows: each size is compiled."""
  part = max(1, block // _PARTS)
  whole = lambda rows: -(-rows // part) * part
  return _Rows(max(part, min(whole(block), whole(num_rows))), part)


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
  rows: _Rows, x_TD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, axis: int
) -> jax.Array:
  """The grouped product, contracting `axis` of each matrix."""
  num_rows = x_TD.shape[0]
  windows = _windows(rows, num_rows, sizes_E)
  # The last window reaches past the rows, into zeros that are cut off at the end.
  x_TD = jnp.pad(x_TD, ((0, rows.block), (0, 0)))

  def body(index: jax.Array, y_TF: jax.Array) -> jax.Array:
    start = windows.start_W[index]
    x_MD = lax.dynamic_slice_in_dim(x_TD, start, rows.block)
    w_DF = lax.dynamic_index_in_dim(w_EDF, windows.expert_W[index], keepdims=False)

    def product(used: int, x_MD: jax.Array, w_DF: jax.Array) -> jax.Array:
      y_MF = lax.dot_general(x_MD[:used], w_DF, (((1,), (axis,)), ((), ())))
      return jnp.pad(y_MF, ((0, rows.block - used), (0, 0)))

    y_MF = _by_rows(rows, windows.parts_W[index], product, x_MD, w_DF)
    return lax.dynamic_update_slice_in_dim(y_TF, y_MF, start, 0)

  y_TF = jnp.zeros((num_rows + rows.block, w_EDF.shape[2 - axis]), x_TD.dtype)
  y_TF = lax.fori_loop(0, windows.count, body, y_TF)
  used_T1 = jnp.arange(num_rows)[:, None] < jnp.sum(sizes_E)
  return jnp.where(used_T1, y_TF[:num_rows], 0)


def _outer(
  rows: _Rows, x_TD: jax.Array, dy_TF: jax.Array, sizes_E: jax.Array
) -> jax.Array:
  """`sum_t x[t] dy[t]^T` over the rows of each group, `[E, D, F]` float32."""
  windows = _windows(rows, x_TD.shape[0], sizes_E)
  ends_E = jnp.cumsum(sizes_E)
  x_TD, dy_TF = (jnp.pad(a, ((0, rows.block), (0, 0))) for a in (x_TD, dy_TF))

  def body(index: jax.Array, dw_EDF: jax.Array) -> jax.Array:
    start, expert = windows.start_W[index], windows.expert_W[index]
    x_MD = lax.dynamic_slice_in_dim(x_TD, start, rows.block)
    dy_MF = lax.dynamic_slice_in_dim(dy_TF, start, rows.block)
    own_M1 = start + jnp.arange(rows.block)[:, None] < ends_E[expert]
    dy_MF = jnp.where(own_M1, dy_MF, 0)

    def product(used: int, x_MD: jax.Array, dy_MF: jax.Array) -> jax.Array:
      over_rows = (((0,), (0,)), ((), ()))
      return lax.dot_general(
        x_MD[:used], dy_MF[:used], over_rows, preferred_element_type=jnp.float32
      )

    dw_DF = _by_rows(rows, windows.parts_W[index], product, x_MD, dy_MF)
    dw_DF += lax.dynamic_index_in_dim(dw_EDF, expert, keepdims=False)
    return lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, expert, 0)

  shape = (sizes_E.shape[0], x_TD.shape[1], dy_TF.shape[1])
  return lax.fori_loop(0, windows.count, body, jnp.zeros(shape, jnp.float32))


class _Windows(NamedTuple):
  """Where each window lies, int32; `count` of them are real.

  Attributes:
    expert_W: its group.
    start_W: its first row.
    parts_W: its rows, in parts.
    count: scalar.
  """

  expert_W: jax.Array
  start_W: jax.Array
  parts_W: jax.Array
  count: jax.Array


def _windows(rows: _Rows, num_rows: int, sizes_E: jax.Array) -> _Windows:
  """The windows of every group, in order."""
  num_groups = sizes_E.shape[0]
  starts_E = jnp.cumsum(sizes_E) - sizes_E
  counts_E = -(-sizes_E // rows.block)
  last_E = jnp.cumsum(counts_E)
  index_W = jnp.arange(num_rows // rows.block + num_groups)
  expert_W = jnp.searchsorted(last_E, index_W, side="right").astype(jnp.int32)
  expert_W = jnp.minimum(expert_W, num_groups - 1)
  done_W = (index_W - (last_E - counts_E)[expert_W]) * rows.block
  left_W = jnp.clip(sizes_E[expert_W] - done_W, 1, rows.block)
  parts_W = -(-left_W // rows.part)
  return _Windows(expert_W, starts_E[expert_W] + done_W, parts_W, last_E[-1])


def _by_rows(
  rows: _Rows, parts: jax.Array, product: Callable[..., jax.Array], *args: jax.Array
) -> jax.Array:
  """`product(used, *args)` for the static number of rows that `parts` stands for."""
  sizes = range(rows.part, rows.block + 1, rows.part)
  return lax.switch(parts - 1, [functools.partial(product, n) for n in sizes], *args)


def _countable(x_TD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """The same product, traced with the rows it would multiply for even groups."""
  num_rows, num_groups = x_TD.shape[0], w_EDF.shape[0]
  share, rest = divmod(num_rows, num_groups)
  even = [share + (expert < rest) for expert in range(num_groups)]
  wasted = sum(window_rows(even)) - num_rows
  x_TD = jnp.pad(x_TD, ((0, wasted), (0, 0)))
  return lax.ragged_dot(x_TD, w_EDF, sizes_E)[:num_rows]
