"""The grouped product as Pallas kernels for GPUs, written for Triton.

A program takes up to `_ROWS` rows of one group times a tile of its matrix. Which rows
and which matrix, it reads from a table, so nothing is padded or copied, and an empty
group costs nothing. After Gale et al. 2022, arXiv:2211.15841, section 5.1, with the
rows at the end of a group masked in place of groups padded to whole blocks.

Measured on an H200 by experiments/gpu_kernels (JAX 0.11.2, bfloat16, 16,384 rows of
1,024 times 2,048, forward and gradient): 4 groups 0.25 and 0.38 ms, 64 groups 0.35 and
0.56 ms; `lax.ragged_dot` 0.43 and 1.1 ms, 5.5 and 16 ms. Outputs and gradients are
within 1.7e-3 of float32 ones, in norm, in float32 (which is TF32 there unless more is
asked for) within 3e-4.

Letters: W tiles of M rows; a tile of the product has N columns and adds up K entries at
a time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.typing import DTypeLike

# The fastest of eight choices there.
_ROWS, _COLUMNS, _DEPTH = 128, 128, 64
_WARPS, _STAGES = 8, 3


DTYPES = ("bfloat16", "float16", "float32")


class _Tiles(NamedTuple):
  """Where the rows of each tile lie, int32; tiles that start at their end have none.

  Attributes:
    group_W: their group.
    start_W: the first of them.
    end_W: the end of the group.
  """

  group_W: jax.Array
  start_W: jax.Array
  end_W: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
  x_TD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
  """`y[t] = x[t] @ w[group of t]`; see `grouped.grouped_matmul`.

  Args:
    x_TD: rows, sorted by group.
    w_EDF: a matrix a group, in the dtype of x, which is one of DTYPES.
    sizes_E: rows of each group, int32.
    interpret: runs on any platform, slowly, for tests.
  """
  return _product(x_TD, w_EDF, sizes_E, False, interpret)


def _forward(
  x_TD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  y_TF = _product(x_TD, w_EDF, sizes_E, False, interpret)
  return y_TF, (x_TD, w_EDF, sizes_E)


def _backward(
  interpret: bool, residuals: tuple[jax.Array, ...], dy_TF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  x_TD, w_EDF, sizes_E = residuals
  dx_TD = _product(dy_TF, w_EDF, sizes_E, True, interpret)
  dw_EDF = _outer(x_TD, dy_TF, sizes_E, w_EDF.dtype, interpret)
  return dx_TD, dw_EDF, None


grouped_matmul.defvjp(_forward, _backward)


def _product(
  x_TD: jax.Array,
  w_EDF: jax.Array,
  sizes_E: jax.Array,
  transpose: bool,
  interpret: bool,
) -> jax.Array:
  """The grouped product with each matrix, or with its transpose."""
  num_rows, depth = x_TD.shape
  columns = w_EDF.shape[1 if transpose else 2]
  tiles = _tiles(num_rows, sizes_E)

  def kernel(group_ref, start_ref, end_ref, x_ref, w_ref, y_ref):
    index = pl.program_id(0)
    start, end = start_ref[index], end_ref[index]
    column = pl.program_id(1) * _COLUMNS

    @pl.when(start < end)
    def compute():
      group = group_ref[index]
      rows_M1 = (start + jnp.arange(_ROWS) < end)[:, None]
      columns_1N = (column + jnp.arange(_COLUMNS) < columns)[None]

      def add(step, y_MN):
        at = pl.ds(step * _DEPTH, _DEPTH)
        deep_K = step * _DEPTH + jnp.arange(_DEPTH) < depth
        x_MK = pltriton.load(
          x_ref.at[pl.ds(start, _ROWS), at], mask=rows_M1 & deep_K[None], other=0.0
        )
        if transpose:
          w_NK = pltriton.load(
            w_ref.at[group, pl.ds(column, _COLUMNS), at],
            mask=columns_1N.T & deep_K[None],
            other=0.0,
          )
          return y_MN + pltriton.dot(x_MK, w_NK.T)
        w_KN = pltriton.load(
          w_ref.at[group, at, pl.ds(column, _COLUMNS)],
          mask=deep_K[:, None] & columns_1N,
          other=0.0,
        )
        return y_MN + pltriton.dot(x_MK, w_KN)

      y_MN = jnp.zeros((_ROWS, _COLUMNS), jnp.float32)
      y_MN = jax.lax.fori_loop(0, pl.cdiv(depth, _DEPTH), add, y_MN)
      pltriton.store(
        y_ref.at[pl.ds(start, _ROWS), pl.ds(column, _COLUMNS)],
        y_MN.astype(y_ref.dtype),
        mask=rows_M1 & columns_1N,
      )

  slack = _ROWS if interpret else 0
  y_TF = pl.pallas_call(
    kernel,
    grid=(tiles.group_W.size, pl.cdiv(columns, _COLUMNS)),
    out_shape=jax.ShapeDtypeStruct((num_rows + slack, columns + slack), x_TD.dtype),
    compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
    interpret=interpret,
    name="grouped_matmul",
  )(*tiles, _padded(x_TD, slack), _padded(w_EDF, slack))
  used_T1 = jnp.arange(num_rows)[:, None] < jnp.sum(sizes_E)
  return jnp.where(used_T1, y_TF[:num_rows, :columns], 0)


def _outer(
  x_TD: jax.Array,
  dy_TF: jax.Array,
  sizes_E: jax.Array,
  dtype: DTypeLike,
  interpret: bool,
) -> jax.Array:
  """`sum_t x[t] dy[t]^T` over the rows of each group."""
  num_groups, depth, columns = sizes_E.shape[0], x_TD.shape[1], dy_TF.shape[1]
  ends_E = jnp.cumsum(sizes_E).astype(jnp.int32)
  starts_E = ends_E - sizes_E.astype(jnp.int32)
  rows = _DEPTH

  def kernel(start_ref, end_ref, x_ref, dy_ref, dw_ref):
    group = pl.program_id(0)
    start, end = start_ref[group], end_ref[group]
    row, column = pl.program_id(1) * _ROWS, pl.program_id(2) * _COLUMNS
    rows_M = row + jnp.arange(_ROWS) < depth
    columns_N = column + jnp.arange(_COLUMNS) < columns

    def add(step, dw_MN):
      at = start + step * rows
      own_K1 = (at + jnp.arange(rows) < end)[:, None]
      x_KM = pltriton.load(
        x_ref.at[pl.ds(at, rows), pl.ds(row, _ROWS)],
        mask=own_K1 & rows_M[None],
        other=0.0,
      )
      dy_KN = pltriton.load(
        dy_ref.at[pl.ds(at, rows), pl.ds(column, _COLUMNS)],
        mask=own_K1 & columns_N[None],
        other=0.0,
      )
      return dw_MN + pltriton.dot(x_KM.T, dy_KN)

    dw_MN = jnp.zeros((_ROWS, _COLUMNS), jnp.float32)
    dw_MN = jax.lax.fori_loop(0, pl.cdiv(end - start, rows), add, dw_MN)
    pltriton.store(
      dw_ref.at[group, pl.ds(row, _ROWS), pl.ds(column, _COLUMNS)],
      dw_MN.astype(dw_ref.dtype),
      mask=rows_M[:, None] & columns_N[None],
    )

  slack = _ROWS if interpret else 0
  shape = (num_groups, depth + slack, columns + slack)
  dw_EDF = pl.pallas_call(
    kernel,
    grid=(num_groups, pl.cdiv(depth, _ROWS), pl.cdiv(columns, _COLUMNS)),
    out_shape=jax.ShapeDtypeStruct(shape, dtype),
    compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
    interpret=interpret,
    name="grouped_outer",
  )(starts_E, ends_E, _padded(x_TD, slack), _padded(dy_TF, slack))
  return dw_EDF[:, :depth, :columns]


def _padded(x: jax.Array, slack: int) -> jax.Array:
  """Room behind the ends: an interpreted slice is moved back where it reaches out."""
  widths = [(0, slack)] * 2
  return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + widths) if slack else x


def _tiles(num_rows: int, sizes_E: jax.Array) -> _Tiles:
  """Tiles of each group, in order; those past the last one are empty."""
  num_groups = sizes_E.shape[0]
  ends_E = jnp.cumsum(sizes_E).astype(jnp.int32)
  counts_E = -(-sizes_E // _ROWS)
  last_E = jnp.cumsum(counts_E)
  index_W = jnp.arange(pl.cdiv(num_rows, _ROWS) + num_groups, dtype=jnp.int32)
  group_W = jnp.searchsorted(last_E, index_W, side="right").astype(jnp.int32)
  real_W = group_W < num_groups
  group_W = jnp.minimum(group_W, num_groups - 1)
  first_W = (last_E - counts_E)[group_W]
  start_W = (ends_E - sizes_E)[group_W] + (index_W - first_W) * _ROWS
  end_W = jnp.where(real_W, ends_E[group_W], 0)
  return _Tiles(group_W, start_W.astype(jnp.int32), end_W)
