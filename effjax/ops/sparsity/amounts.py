"""How much of each matrix is pruned, and when: plain numbers, computed on the host.

ERK is Evci et al. 2020, arXiv:1911.11134, section 3 (from Mocanu et al. 2018,
arXiv:1707.04780); the cubic schedule is Zhu and Gupta 2017, arXiv:1710.01878, eq. 1;
the cosine that the moved share follows is section 3 of Evci et al.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np


def erk_densities(
  shapes: Mapping[str, Sequence[int]], sparsity: float
) -> dict[str, float]:
  """The density of each matrix under ERK, in proportion to (I + O) / (I O).

  Args:
    shapes: of matrices `[*stack, I, O]`; stacked ones are as many of their size.
    sparsity: share of all weights to prune, in [0, 1).

  Returns:
    Densities in (0, 1]: matrices that would have to be denser than dense are dense, and
    the others share what is left.
  """
  size = {path: math.prod(shape) for path, shape in shapes.items()}
  raw = {
    path: sum(shape[-2:]) / math.prod(shape[-2:]) for path, shape in shapes.items()
  }
  wanted = (1 - sparsity) * sum(size.values())
  dense: set[str] = set()
  while True:
    free = [path for path in shapes if path not in dense]
    left = wanted - sum(size[path] for path in dense)
    scale = left / sum(raw[path] * size[path] for path in free) if free else 0.0
    over = {path for path in free if scale * raw[path] > 1}
    if not over:
      return {path: 1.0 if path in dense else scale * raw[path] for path in shapes}
    # The densest first: what is then left for the others may make no more of them so.
    top = max(raw[path] for path in over)
    dense |= {path for path in over if raw[path] == top}


def shares(
  shapes: Mapping[str, Sequence[int]], sparsity: float, budget: str
) -> dict[str, float]:
  """The share of each matrix that is pruned.

  Args:
    shapes: of matrices `[*stack, I, O]`; all of a stack lose as many.
    sparsity: share of all weights to prune, in [0, 1).
    budget: "uniform" (the same share of each) or "erk".
  """
  if budget == "erk":
    return {p: 1 - density for p, density in erk_densities(shapes, sparsity).items()}
  return dict.fromkeys(shapes, sparsity)


def number_kept(size: int, share: float) -> int:
  """What is left of `size` weights: round(share x size) go, halves to even."""
  return size - round(share * size)


def cubic(start: float, end: float, num_updates: int) -> np.ndarray:
  """Sparsities s_0 to s_n of n updates: s_f + (s_i - s_f) (1 - j / n)^3.

  Args:
    start: s_i.
    end: s_f.
    num_updates: n, at least 1.

  Returns:
    float64 [n + 1].
  """
  left = 1 - np.arange(num_updates + 1) / num_updates
  return end + (start - end) * left**3


def cosine(share: float, step: int, end: float) -> float:
  """The share of weights moved at `step`: share / 2 (1 + cos(pi step / end))."""
  return share / 2 * (1 + math.cos(math.pi * step / end))
