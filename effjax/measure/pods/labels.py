"""Which logical axis each dimension of a traced value is, told from the parameters.

Parameters name their axes (`core.specs`); what is computed from them inherits names
dimension by dimension: a product from the free dimensions of its operands, a reshape
from the first dimension of every group of dimensions that it merges or splits, and
anything else from an operand that has the same size in the same place. What follows
none of these has no name, which is the safe answer: nothing is split there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend import core as jex

Axes = tuple[str | None, ...]


class Labels:
  """Axes of the values of a jaxpr.

  Attributes:
    scans: every scan that was walked, outermost first.
    axes: of each of its results, by the identity of the equation.
    products: every product of two values that are no weights, by where it stands (the
      identities of the equations around it), with how often it runs.
  """

  def __init__(self) -> None:
    self.scans: list[Any] = []
    self.axes: dict[int, list[Axes]] = {}
    self.products: dict[tuple[int, ...], tuple[Any, int]] = {}
    self._around: tuple[int, ...] = ()
    self._times = 1

  def walk(self, jaxpr: Any, given: Sequence[Axes]) -> list[Axes]:
    """Axes of a jaxpr's results, from those of its arguments."""
    known: dict[Any, Axes] = dict(zip(jaxpr.invars, given, strict=True))

    def axes(var: Any) -> Axes:
      none = (None,) * len(getattr(var.aval, "shape", ()))
      return none if isinstance(var, jex.Literal) else known.get(var, none)

    for eqn in jaxpr.eqns:
      found = self._equation(eqn, [axes(v) for v in eqn.invars])
      known.update(zip(eqn.outvars, found, strict=True))
    return [axes(v) for v in jaxpr.outvars]

  def _equation(self, eqn: Any, given: list[Axes]) -> list[Axes]:
    around = self._around
    self._around = (*around, id(eqn))
    found = self._results(eqn, given)
    self._around = around
    return found

  def _results(self, eqn: Any, given: list[Axes]) -> list[Axes]:
    if eqn.primitive.name == "dot_general" and not any(map(_is_weight, given)):
      self.products[self._around] = (eqn, self._times)
    if eqn.primitive.name == "scan":
      return self._scan(eqn, given)
    if eqn.primitive.name in _RULES:
      return [_RULES[eqn.primitive.name](eqn, given)]
    inner = _called(eqn)
    if inner is not None and len(inner.invars) == len(given):
      return self.walk(inner, given)
    return [_like_operands(eqn, given, v.aval.shape) for v in eqn.outvars]

  def _scan(self, eqn: Any, given: list[Axes]) -> list[Axes]:
    consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    body = eqn.params["jaxpr"].jaxpr
    carry = given[consts : consts + carried]
    slices = [axes[1:] for axes in given[consts + carried :]]
    self._times *= eqn.params["length"]
    # A carry may start as zeros: the second walk knows what the first made of it.
    for _ in range(2):
      found = self.walk(body, [*given[:consts], *carry, *slices])
      carry = [_join(*pair) for pair in zip(carry, found, strict=False)]
    self._times //= eqn.params["length"]
    results = [*carry, *(("layers", *axes) for axes in found[carried:])]
    if id(eqn) not in self.axes:
      self.scans.append(eqn)
    self.axes[id(eqn)] = results
    return results


def _called(eqn: Any) -> Any:
  for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    inner = eqn.params.get(name)
    if inner is not None and eqn.primitive.name != "pallas_call":
      return getattr(inner, "jaxpr", inner)
  return None


def _is_weight(axes: Axes) -> bool:
  """Whether all dimensions are those of a parameter."""
  return all(axes) and not {"batch", "length"} & set(axes)


def _join(one: Axes, other: Axes) -> Axes:
  return tuple(a or b for a, b in zip(one, other, strict=True))


def _product(eqn: Any, given: list[Axes]) -> Axes:
  contracted, batch = eqn.params["dimension_numbers"]
  left, right = given[:2]
  free = [
    [a for d, a in enumerate(axes) if d not in (*contracted[i], *batch[i])]
    for i, axes in enumerate((left, right))
  ]
  shared = [left[i] or right[j] for i, j in zip(*batch, strict=True)]
  return (*shared, *free[0], *free[1])


def _transpose(eqn: Any, given: list[Axes]) -> Axes:
  return tuple(given[0][d] for d in eqn.params["permutation"])


def _broadcast(eqn: Any, given: list[Axes]) -> Axes:
  shape, found = eqn.params["shape"], [None] * len(eqn.params["shape"])
  for axis, dim in enumerate(eqn.params["broadcast_dimensions"]):
    if eqn.invars[0].aval.shape[axis] == shape[dim]:
      found[dim] = given[0][axis]
  return tuple(found)


def _reduced(eqn: Any, given: list[Axes]) -> Axes:
  return tuple(a for d, a in enumerate(given[0]) if d not in eqn.params["axes"])


def _squeezed(eqn: Any, given: list[Axes]) -> Axes:
  dims = eqn.params["dimensions"]
  return tuple(a for d, a in enumerate(given[0]) if d not in dims)


def _rows(eqn: Any, given: list[Axes]) -> Axes:
  """Of a gather: whole dimensions of the operand, after those of the indices."""
  numbers = eqn.params["dimension_numbers"]
  dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  operand = eqn.invars[0].aval.shape
  kept = iter([d for d in range(len(operand)) if d not in dropped])
  found: list[str | None] = [None] * len(eqn.outvars[0].aval.shape)
  for dim in numbers.offset_dims:
    source = next(kept)
    if operand[source] == eqn.outvars[0].aval.shape[dim]:
      found[dim] = given[0][source]
  free = [dim for dim in range(len(found)) if dim not in numbers.offset_dims]
  for dim, axis in zip(free, given[1], strict=False):
    found[dim] = axis
  return tuple(found)


def _reshaped(eqn: Any, given: list[Axes]) -> Axes:
  old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  found: list[str | None] = [None] * len(new)
  for before, after in _groups(old, new):
    large = [d for d in after if new[d] > 1] or after
    names = [given[0][d] for d in before if given[0][d]]
    if names and large:
      found[large[0]] = names[0]
  return tuple(found)


def _groups(
  old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
  """Dimensions of two shapes that hold the same entries, the fewest at a time."""
  i = j = 0
  while i < len(old) and j < len(new):
    before, after = [i], [j]
    i, j = i + 1, j + 1
    while (sizes := [_size(old, before), _size(new, after)])[0] != sizes[1]:
      if sizes[0] < sizes[1]:
        before.append(i)
        i += 1
      else:
        after.append(j)
        j += 1
    yield before, after


def _size(shape: Sequence[int], dims: Sequence[int]) -> int:
  return math.prod(shape[d] for d in dims)


def _like_operands(eqn: Any, given: list[Axes], shape: Sequence[int]) -> Axes:
  found: list[str | None] = [None] * len(shape)
  for var, axes in zip(eqn.invars, given, strict=True):
    sizes = getattr(var.aval, "shape", ())
    if len(sizes) < len(shape):
      continue
    for dim, size in enumerate(shape):
      if found[dim] is None and sizes[dim] == size:
        found[dim] = axes[dim]
  return tuple(found)


_RULES: dict[str, Callable[[Any, list[Axes]], Axes]] = {
  "dot_general": _product,
  "transpose": _transpose,
  "broadcast_in_dim": _broadcast,
  "squeeze": _squeezed,
  "gather": _rows,
  "reshape": _reshaped,
  **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduced),
}
