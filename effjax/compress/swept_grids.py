"""A sweep over the inputs of a matrix in which what stays is put on a grid.

What GPTQ and SparseGPT with a quantizer share: each input's weights are pruned, if they
are, and rounded, and all later inputs make up for both errors (ops.matmul.column_sweep;
Frantar and Alistarh 2023, arXiv:2301.00774, section 3.5). Which weights stay is known
before, as a mask, or chosen while the sweep goes on.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effjax.compress.quantize import rtn
from effjax.core import config
from effjax.ops.matmul import column_sweep
from effjax.weights.formats import base


class Choice(NamedTuple):
  """Which weights stay, chosen from the weights of several inputs as they stand.

  Attributes:
    size: inputs that are chosen from together, B.
    choose: the mask `[B, O]` of a block of them.
  """

  size: int
  choose: Callable[[column_sweep.Block], jax.Array]


class Rounded(NamedTuple):
  """What a sweep made.

  Attributes:
    codes: `[I, O]`, in the order of the sweep.
    grid: of parts `[groups, 1, O]` (see weights.formats.base).
    mask: bool `[I, O]` of what was chosen, or None.
    loss: tr((W - Q)^T H (W - Q)), a scalar.
  """

  codes: jax.Array
  grid: dict[str, jax.Array]
  mask: jax.Array | None
  loss: jax.Array


def choice_size(in_dim: int, group: int, most: int) -> int:
  """The most inputs, up to `most`, for which a choice and groups begin together.

  Args:
    in_dim: inputs of the matrix.
    group: of the grids, a divisor of it.
    most: wanted.
  """
  if group > most:
    return column_sweep.block_size(group, most)
  return group * column_sweep.block_size(in_dim // group, most // group)


def sweep(
  fmt: base.Format,
  w: jax.Array,
  upper: jax.Array,
  *,
  range: str = "absmax",
  static: bool = False,
  block: int = 128,
  order: jax.Array | None = None,
  mask: jax.Array | None = None,
  choice: Choice | None = None,
) -> Rounded:
  """Prunes and rounds the inputs of a matrix in order.

  Grids are fitted where their groups begin, to the weights that stay of them as they
  stand; where a choice is made more often than that, and of static grids with a choice,
  to all weights, since which ones stay is not known yet.

  Args:
    fmt: the format.
    w: `[I, O]` in its own order, float32 or float64.
    upper: U `[I, I]` in the order of the sweep.
    range: see rtn.RTNOptions.
    static: whether all grids are fitted before.
    block: most inputs whose updates of the rest are put together, of static grids.
    order: the inputs in the order of the sweep, of static grids; None for their own.
    mask: bool like w, known before; w is zero where it is False.
    choice: instead of a mask.

  Raises:
    InputError: choices and groups do not begin together.
  """
  in_dim = w.shape[0]
  group = fmt.group_of(in_dim)
  static = static or fmt.static_grids or group == in_dim
  if choice and not static:
    config.require(
      choice.size % group == 0 or group % choice.size == 0,
      f"groups of {group} inputs with a scale, and {choice.size} that are pruned "
      "together: one must be a multiple of the other",
    )
  plan = _static if static else _by_group
  outer, start, inner, grid_of, finish = plan(fmt, w, range, block, mask, choice)

  def keep(started: Any, row: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
    place = i if order is None else order[i]
    grid, chosen = grid_of(started, place)
    kept = mask[place] if mask is not None else None
    if choice:
      kept = chosen[i % chosen.shape[0]]
    values, codes = _nearest(fmt, grid, row, kept)
    return values, (codes, kept if choice else ())

  ordered = w if order is None else w[order]
  swept = column_sweep.sweep(ordered, upper, outer, start, keep, inner)
  codes, chosen = swept.parts
  return Rounded(codes, finish(swept), chosen if choice else None, swept.loss)


def _static(
  fmt: base.Format,
  w: jax.Array,
  range: str,
  block: int,
  mask: jax.Array | None,
  choice: Choice | None,
) -> tuple[Any, ...]:
  """With all grids fitted before."""
  del mask
  group = fmt.group_of(w.shape[0])
  grid = rtn.fit(fmt, base.split(w, group), range)

  def grid_of(started: Any, i: jax.Array) -> tuple[Any, Any]:
    return {n: _of_group(part, i // group) for n, part in grid.items()}, started

  start = choice.choose if choice else lambda block: ()
  outer = choice.size if choice else column_sweep.block_size(w.shape[0], block)
  return outer, start, None, grid_of, lambda swept: grid


def _by_group(
  fmt: base.Format,
  w: jax.Array,
  range: str,
  block: int,
  mask: jax.Array | None,
  choice: Choice | None,
) -> tuple[Any, ...]:
  """With each grid fitted when its group is reached, which therefore begins a block."""
  del block
  group = fmt.group_of(w.shape[0])
  x = base.split(w, group)
  whole = fmt.outer(x)

  def fit(here: column_sweep.Block, kept: jax.Array | None) -> dict[str, jax.Array]:
    rows = here.rows if kept is None else jnp.where(kept, here.rows, 0)
    return rtn.fit(fmt, rows[None], range, whole)

  def of_mask(here: column_sweep.Block) -> dict[str, jax.Array]:
    if mask is None:
      return fit(here, None)
    first = here.index * group
    return fit(here, jax.lax.dynamic_slice_in_dim(mask, first, group))

  def of_choice(chosen: jax.Array, here: column_sweep.Block) -> dict[str, jax.Array]:
    first = here.index * group % chosen.shape[0]
    return fit(here, jax.lax.dynamic_slice_in_dim(chosen, first, group))

  # What all groups share was given with each.
  shared = jax.eval_shape(lambda: rtn.fit(fmt, x, range))
  first = lambda parts: {n: p[: shared[n].shape[0], 0] for n, p in parts.items()}
  of_blocks = lambda swept: first(swept.blocks)
  if choice is None:
    return group, of_mask, None, lambda grid, i: (grid, None), of_blocks
  if choice.size < group:
    inner = column_sweep.Inner(choice.size, lambda grid, here: choice.choose(here))
    return group, lambda b: fit(b, None), inner, lambda both, i: both, of_blocks
  inner = column_sweep.Inner(group, of_choice)
  of_inner = lambda swept: first(swept.inner_blocks)
  return choice.size, choice.choose, inner, lambda both, i: both[::-1], of_inner


def _nearest(
  fmt: base.Format,
  grid: Mapping[str, jax.Array],
  row: jax.Array,
  mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """The values that a row `[out]` is rounded to, and their codes."""
  kept = row if mask is None else jnp.where(mask, row, 0)
  codes = fmt.encode(kept[None, None], grid)
  values = fmt.decode(codes, grid)[0, 0].astype(row.dtype)
  # A zero of the mask is one whatever its code stands for.
  return values if mask is None else jnp.where(mask, values, 0), codes[0, 0]


def _of_group(part: jax.Array, index: jax.Array) -> jax.Array:
  """A part of a grid as one group has it, also where all share it."""
  return part if len(part) == 1 else jax.lax.dynamic_slice_in_dim(part, index, 1)
