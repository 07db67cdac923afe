"""The scale searches of ggml's K-quants, over many super-blocks at once.

A super-block of 256 elements has 8 or 16 sub-blocks. Each sub-block's scale (and min)
is the best of a few weighted least-squares fits; then the scales themselves are rounded
to 4, 6 or 8 bits against one float16, and the codes are rounded again under the scales
that came out. Source: quantize_row_q2_K_ref to quantize_row_q6_K_ref of ggml-quants.c.

Every sum runs over the elements of a sub-block in their order, in float32, because the
search compares errors that differ in the last bit.

Shapes: N super-blocks, M sub-blocks of all of them, S elements of a sub-block. Arrays
are [S, M] so that each step of a sum is one contiguous addition.
"""

import dataclasses

import numpy as np

from effjax.interop.gguf.blocks import Fields
from effjax.interop.gguf.formats import Format

_F = np.float32
# A sub-block whose values are all smaller is stored as zero.
_TINY = _F(1e-15)
# How often Q3_K goes over a sub-block's codes.
_PASSES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Grid:
  """The scales that `_search_affine` tries: span / (codes + start + 0.1 * step).

  Errors are squares, or `absolute`, then weighted by the size of an element alone.
  """

  start: float
  num_steps: int
  absolute: bool = False


_GRIDS = {
  "Q2_K": _Grid(start=-0.5, num_steps=15, absolute=True),
  "Q4_K": _Grid(start=-1.0, num_steps=20),
  "Q5_K": _Grid(start=-0.5, num_steps=15),
}


def affine(x_NS: np.ndarray, format: Format) -> Fields:
  """Q2_K, Q4_K and Q5_K: fields of float32 [super-blocks, 256]."""
  _, high = format.code_range
  x_SM = np.ascontiguousarray(x_NS.reshape(-1, format.sub_block).T)
  codes_SM, scale_M, min_M = _search_affine(x_SM, high, _GRIDS[format.name])
  _, most = format.sub_range
  scales, sub_scales, step_M = _share(scale_M.reshape(len(x_NS), -1), most)
  mins, sub_mins, min_M = _share(min_M.reshape(len(x_NS), -1), most)
  again_SM = _clip(_nearest((x_SM + min_M) / step_M), 0, high)
  codes_SM = np.where(step_M != 0, again_SM, codes_SM)
  return Fields(
    codes=codes_SM.T.reshape(x_NS.shape).astype(np.uint8),
    scales=scales,
    mins=mins,
    sub_scales=sub_scales,
    sub_mins=sub_mins,
  )


def symmetric(x_NS: np.ndarray, format: Format) -> Fields:
  """Q3_K and Q6_K: fields of float32 [super-blocks, 256]."""
  low, high = format.code_range
  lowest_sub, most = format.sub_range
  x_SM = np.ascontiguousarray(x_NS.reshape(-1, format.sub_block).T)
  refines = format.name == "Q3_K"
  codes_SM, scale_M = (_refine if refines else _search_symmetric)(x_SM, low, high)
  scale_NB = scale_M.reshape(len(x_NS), -1)
  place = np.abs(scale_NB).argmax(axis=-1, keepdims=True)
  largest = np.take_along_axis(scale_NB, place, axis=-1)
  zero = largest == 0 if refines else np.abs(largest) < _TINY
  inverse = np.where(zero, 0, _F(lowest_sub) / largest)
  scales = np.where(zero, 0, 1 / inverse).astype(np.float16)
  sub_scales = np.minimum(_nearest(inverse * scale_NB), most).astype(np.int8)
  step_M = (scales.astype(_F) * sub_scales.astype(_F)).reshape(-1)
  again_SM = _clip(_nearest(x_SM / step_M), low, high)
  # What ggml leaves where nothing is to be coded: zero bytes, which is the lowest code.
  codes_SM = np.where(np.repeat(zero, scale_NB.shape[1]), _F(low), codes_SM)
  if refines:
    sub_scales = np.where(zero, np.int8(lowest_sub), sub_scales)
  codes_SM = np.where(step_M != 0, again_SM, codes_SM)
  return Fields(
    codes=codes_SM.T.reshape(x_NS.shape).astype(np.int8),
    scales=scales,
    sub_scales=sub_scales,
  )


def _search_affine(
  x_SM: np.ndarray, high: int, grid: _Grid
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Codes, scales and (negated) mins of least weighted square error.

  The weight of an element is its size, plus the root mean square of its sub-block where
  errors are squares. Each step rounds under one trial scale and the min of the best fit
  so far, then solves min over (s, m) of sum w (s * code + m - x)^2, with m <= 0.
  """
  size = _F(len(x_SM))
  weight_SM = np.abs(x_SM)
  if not grid.absolute:
    weight_SM = np.sqrt(_sum(x_SM * x_SM) / size) + weight_SM
  sum_w, sum_x = _sum(weight_SM), _sum(weight_SM * x_SM)
  greatest = x_SM.max(axis=0)
  min_M = np.minimum(x_SM.min(axis=0), _F(0))
  flat = greatest == min_M
  inverse = _F(high) / (greatest - min_M)
  scale_M = np.where(flat, _F(0), 1 / inverse)
  codes_SM = _clip(_nearest(inverse * (x_SM - min_M)), 0, high)
  codes_SM[:, flat] = 0
  best = _error(codes_SM, scale_M, min_M, x_SM, weight_SM, grid.absolute)
  for step in range(grid.num_steps + 1):
    trial = _F(grid.start) + _F(0.1) * _F(step) + _F(high)
    inverse = trial / (greatest - min_M)
    l_SM = _clip(_nearest(inverse * (x_SM - min_M)), 0, high)
    wl_SM = weight_SM * l_SM
    sum_l, sum_l2, sum_xl = _sum(wl_SM), _sum(wl_SM * l_SM), _sum(wl_SM * x_SM)
    determinant = sum_w * sum_l2 - sum_l * sum_l
    fit = (sum_w * sum_xl - sum_x * sum_l) / determinant
    fit_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    positive = fit_min > 0
    fit = np.where(positive, sum_xl / sum_l2, fit)
    fit_min = np.where(positive, _F(0), fit_min)
    error = _error(l_SM, fit, fit_min, x_SM, weight_SM, grid.absolute)
    better = ~flat & (determinant > 0) & (error < best)
    np.copyto(codes_SM, l_SM, where=better)
    for kept, new in ((best, error), (scale_M, fit), (min_M, fit_min)):
      np.copyto(kept, new, where=better)
  return codes_SM, scale_M, -min_M


def _search_symmetric(
  x_SM: np.ndarray, low: int, high: int
) -> tuple[np.ndarray, np.ndarray]:
  """Codes and scales of least square error, each element weighted by its square.

  Tries 19 scales around the one that gives the largest element the lowest code.
  """
  place = np.abs(x_SM).argmax(axis=0, keepdims=True)
  largest = np.take_along_axis(x_SM, place, axis=0)[0]
  zero = np.abs(largest) < _TINY
  weight_SM = x_SM * x_SM
  wx_SM = weight_SM * x_SM
  codes_SM = scale_M = best = None
  for step in (0, *range(-9, 0), *range(1, 10)):
    inverse = (_F(low) - _F(0.1) * _F(step)) / largest
    l_SM = _clip(_nearest(inverse * x_SM), low, high)
    sum_xl, sum_l2 = _sum(wx_SM * l_SM), _sum(weight_SM * l_SM * l_SM)
    fit = np.where(sum_l2 > 0, sum_xl / sum_l2, _F(0))
    if codes_SM is None:
      codes_SM, scale_M, best = l_SM, fit, fit * sum_xl
      continue
    better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
    np.copyto(codes_SM, l_SM, where=better)
    np.copyto(scale_M, fit, where=better)
    np.copyto(best, fit * sum_xl, where=better)
  codes_SM[:, zero] = low
  scale_M[zero] = 0
  return codes_SM, scale_M


def _refine(x_SM: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
  """As `_search_symmetric`, of codes that are changed one by one.

  Each gets the value that is best for the scale that the others have, where that is an
  improvement.
  """
  place = np.abs(x_SM).argmax(axis=0, keepdims=True)
  largest = np.take_along_axis(x_SM, place, axis=0)[0]
  zero = np.abs(largest) < _TINY
  weight_SM = x_SM * x_SM
  wx_SM = weight_SM * x_SM
  codes_SM = _clip(_nearest(_F(low) / largest * x_SM), low, high)
  sum_xl, sum_l2 = _sum(wx_SM * codes_SM), _sum(weight_SM * codes_SM * codes_SM)
  for row in list(range(len(x_SM))) * _PASSES:
    w, wx, code = weight_SM[row], wx_SM[row], codes_SM[row]
    rest_xl, rest_l2 = sum_xl - wx * code, sum_l2 - w * code * code
    new = _clip(_nearest(x_SM[row] * rest_l2 / rest_xl), low, high)
    new_xl, new_l2 = rest_xl + wx * new, rest_l2 + w * new * new
    better = (rest_xl > 0) & (new != code) & (new_l2 > 0)
    better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
    for kept, value in ((code, new), (sum_xl, new_xl), (sum_l2, new_l2)):
      np.copyto(kept, value, where=better)
  scale_M = np.where(sum_l2 > 0, sum_xl / sum_l2, _F(0))
  codes_SM[:, zero] = low
  scale_M[zero] = 0
  return codes_SM, scale_M


def _share(
  values_NB: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rounds non-negative values to integers up to `most` against one float16.

  Returns:
    the float16 [N, 1], the uint8 [N, B], and their products, float32 [M].
  """
  largest = np.maximum(values_NB.max(axis=-1, keepdims=True), _F(0))
  inverse = np.where(largest > 0, _F(most) / largest, _F(0))
  # ggml stores the rounded integer in a byte before it takes the smaller of the two.
  sub = np.minimum(_nearest(inverse * values_NB).astype(np.uint8), np.uint8(most))
  half = (largest / _F(most)).astype(np.float16)
  return half, sub, (half.astype(_F) * sub.astype(_F)).reshape(-1)


def _error(
  l_SM: np.ndarray,
  scale_M: np.ndarray,
  min_M: np.ndarray,
  x_SM: np.ndarray,
  weight_SM: np.ndarray,
  absolute: bool,
) -> np.ndarray:
  """Sum of w * (scale * l + min - x)^2, or of the absolute value."""
  difference = scale_M * l_SM
  difference += min_M
  difference -= x_SM
  if absolute:
    np.abs(difference, out=difference)
  else:
    difference *= difference
  difference *= weight_SM
  return _sum(difference)


def _sum(values_SM: np.ndarray) -> np.ndarray:
  """Sum over S from first to last: NumPy's own sum may add pairs."""
  total = values_SM[0].copy()
  for row in values_SM[1:]:
    total += row
  return total


def _nearest(x: np.ndarray) -> np.ndarray:
  """int32 nearest to x, ties to even, by ggml's trick.

  Adding 1.5 * 2^23 leaves the integer in the low bits of the mantissa; beyond 2^22 what
  stays there is not the nearest, but the same as in ggml.
  """
  bits = (x + _F(12582912)).view(np.int32)
  bits &= 0x7FFFFF
  bits -= 0x400000
  return bits


def _clip(l: np.ndarray, low: int, high: int) -> np.ndarray:
  return np.clip(l, low, high, out=l).astype(_F)
