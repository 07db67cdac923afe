"""Sizes of key and value heads, given or in proportion to the width of the model."""

import dataclasses
from typing import ClassVar

from effjax.core import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSizes:
  """Options that size the heads of a recurrent mixer.

  Attributes:
    num_heads: H, heads.
    head_dim: K, size of a query and key head; None for `expand_k` times the model width
      over all heads.
    value_dim: V, size of a value head; None likewise by `expand_v`.
    expand_k: width of all keys over that of the model.
    expand_v: width of all values over that of the model.
    mixer: what errors call the mixer.
  """

  mixer: ClassVar[str]

  num_heads: int = 4
  head_dim: int | None = None
  value_dim: int | None = None
  expand_k: float = 1.0
  expand_v: float = 1.0

  def check_positive(self, *names: str) -> None:
    """Raises InputError unless the sizes, and the options of these names, are."""
    fields = [field.name for field in dataclasses.fields(HeadSizes)]
    for name in (*fields, *names):
      value = getattr(self, name)
      config.require(value is None or value > 0, f"{name}={value} must be positive")

  def sizes(self, embed_dim: int) -> tuple[int, int]:
    """K and V in a model of width `embed_dim`; checks the divisions."""
    key = self.head_dim or self._per_head("expand_k", embed_dim)
    value = self.value_dim or self._per_head("expand_v", embed_dim)
    return key, value

  def width(self, embed_dim: int) -> int:
    """Channels of all values in a model of width `embed_dim`; checks the divisions."""
    return self.num_heads * self.sizes(embed_dim)[1]

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "HeadSizes":
    """The options with `count` heads."""
    del axis
    key, value = self.sizes(embed_dim)
    return dataclasses.replace(self, num_heads=count, head_dim=key, value_dim=value)

  def _per_head(self, name: str, embed_dim: int) -> int:
    expand = getattr(self, name)
    size = expand * embed_dim / self.num_heads
    config.require(
      size == int(size),
      f"{self.mixer} {name}={expand} of width {embed_dim} must be a multiple of its "
      f"num_heads={self.num_heads}",
    )
    return int(size)
