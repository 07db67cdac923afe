"""How one of our parameters lies in the tensors of a foreign file.

A rule names a foreign tensor and says where in it a parameter is: a *view* of the whole
tensor whose entries, in order, are those of the parameter (transposed, where a foreign
matrix is `[out, in]` and ours `[in, out]`). Because it is a view, one rule serves both
directions: an import copies out of it, an export writes through it. Foreign matrices
that are fused (q, k and v in one) are several rules of one name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """Where a parameter is.

  Attributes:
    name: of the foreign tensor; `{k}` is the number of the layer. With `{e}`, expert e
      of a stacked parameter is a tensor of its own.
    transposed: whether the last two axes are swapped.
    view: the part of the whole tensor that is the parameter; None for all of it.
    whole: shape of the whole tensor, from that of the (transposed) parameter; None if
      they are equal.
    decode, encode: from foreign values to ours and back; None if they are equal.
  """

  name: str
  transposed: bool = False
  view: Callable[[np.ndarray], np.ndarray] | None = None
  whole: Callable[[Shape], Shape] | None = None
  decode: Callable[[np.ndarray], np.ndarray] | None = None
  encode: Callable[[np.ndarray], np.ndarray] | None = None

  @property
  def stacked(self) -> bool:
    """Whether every expert has a tensor."""
    return "{e}" in self.name

  def foreign_shape(self, shape: Shape) -> Shape:
    """Shape of the whole foreign tensor, for a parameter (one expert) of `shape`."""
    shape = self.turned(shape)
    return shape if self.whole is None else tuple(self.whole(shape))

  def read(self, foreign: np.ndarray, shape: Shape) -> np.ndarray:
    """The parameter, out of the whole foreign tensor; a view where it can be one."""
    part = foreign if self.view is None else self.view(foreign)
    array = part.reshape(self.turned(shape))
    if self.decode is not None:
      array = self.decode(array)
    return array.swapaxes(-1, -2) if self.transposed else array

  def rows(self, foreign: np.ndarray) -> np.ndarray:
    """The parameter's rows out of a foreign tensor whose rows are held in another way.

    Args:
      foreign: the whole tensor, its last axis anything, such as bytes of blocks.

    Returns:
      The same rows as one contiguous array, `[..., last axis]` flattened in front.
    """
    part = foreign if self.view is None else self.view(foreign)
    return np.ascontiguousarray(part).reshape(-1, foreign.shape[-1])

  def write(self, foreign: np.ndarray, array: np.ndarray) -> None:
    """Writes the parameter where it belongs in the whole foreign tensor."""
    if self.transposed:
      array = array.swapaxes(-1, -2)
    if self.encode is not None:
      array = self.encode(array)
    part = foreign if self.view is None else self.view(foreign)
    part[...] = array.reshape(part.shape)

  def turned(self, shape: Shape) -> Shape:
    """The shape of the parameter (one expert), transposed if the foreign one is."""
    if not self.transposed:
      return tuple(shape)
    return (*shape[:-2], shape[-1], shape[-2])


@runtime_checkable
class Source(Protocol):
  """Foreign tensors that can be read one by one.

  Attributes:
    where: what messages call it.
  """

  where: str

  def shapes(self) -> Mapping[str, Shape]:
    """The shape of every tensor, by name; reads no data."""

  def read(self, name: str) -> np.ndarray:
    """One whole tensor."""


Rules = Mapping[str, Rule]


def same(name: str) -> Rule:
  """The tensor is the parameter: norms, biases, embeddings."""
  return Rule(name=name)


def matrix(name: str) -> Rule:
  """A matrix `[out, in]`, which is `[in, out]` here."""
  return Rule(name=name, transposed=True)


def rows(name: str, start: int, stop: int, total: int, *, transposed: bool) -> Rule:
  """Rows `start` to `stop` of the `total` of a fused matrix or vector."""
  return Rule(
    name=name,
    transposed=transposed,
    view=lambda whole: whole[start:stop],
    whole=lambda shape: (total, *shape[1:]),
  )


def columns(name: str, start: int, stop: int, total: int) -> Rule:
  """Entries of the last axis of a tensor that is not transposed (GPT-2)."""
  return Rule(
    name=name,
    view=lambda whole: whole[..., start:stop],
    whole=lambda shape: (*shape[:-1], total),
  )


def head_rows(name: str, num_heads: int, start: int, stop: int, total: int) -> Rule:
  """Rows `start` to `stop` of the `total` of every head of a fused matrix."""
  return Rule(
    name=name,
    transposed=True,
    view=lambda whole: whole.reshape(num_heads, total, -1)[:, start:stop],
    whole=lambda shape: (num_heads * total, *shape[1:]),
  )


def pair_rows(name: str, num_heads: int, *, transposed: bool) -> Rule:
  """A matrix or bias of heads whose rotated pairs are neighbours, not halves apart.

  Entry i of a head here is rotated with entry i + K/2, and there 2i with 2i + 1.
  """
  return Rule(
    name=name,
    transposed=transposed,
    view=lambda whole: whole.reshape(num_heads, -1, 2, *whole.shape[1:]).swapaxes(1, 2),
  )


def reshaped(name: str, shape: Shape) -> Rule:
  """The tensor has the parameter's values in the same order, in another shape."""
  return Rule(name=name, whole=lambda _: shape)


def fused(
  name: str, parts: Mapping[str, int], *, transposed: bool = True
) -> dict[str, Rule]:
  """One rule a part, for parts of so many rows that lie one after the other."""
  total, start, found = sum(parts.values()), 0, {}
  for ours, size in parts.items():
    found[ours] = rows(name, start, start + size, total, transposed=transposed)
    start += size
  return found


def taps(name: str, start: int = 0, total: int | None = None, size: int = 0) -> Rule:
  """A depthwise kernel `[channels, 1, taps]`: all channels, or `size` of `total`."""
  stop = None if total is None else start + size
  return Rule(
    name=name,
    transposed=True,
    view=lambda whole: whole[start:stop, 0],
    whole=lambda shape: (total or shape[0], 1, shape[1]),
  )


def prefixed(prefix: str, rules: Mapping[str, Rule]) -> dict[str, Rule]:
  """Rules for parameters below `prefix`."""
  return {f"{prefix}{ours}": rule for ours, rule in rules.items()}


def named(table: Mapping[str, str], make: Callable[[str], Rule]) -> dict[str, Any]:
  """The same kind of rule for every entry of a table of names."""
  return {ours: make(theirs) for ours, theirs in table.items()}
