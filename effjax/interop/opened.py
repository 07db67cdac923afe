"""A foreign model whose headers were read and checked, and whose weights were not."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.typing import DTypeLike

from effjax.parallel import spread as spread_lib

Load = Callable[[DTypeLike | None, spread_lib.Spread | None], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
  """What can be had from a source.

  Attributes:
    model: a Decoder or Encoder.
    specs: tree of its ParamSpecs.
    tokenizer: or None, where the source has none.
    origin: what it is, for the record: plain JSON values.
    load: reads the parameters, one tensor at a time: `load(dtype, spread)`; see
      assemble.read.
    abstract: the same tree of ShapeDtypeStructs: `abstract(dtype)`.
  """

  model: Any
  specs: Mapping[str, Any]
  tokenizer: Any
  origin: dict[str, Any]
  load: Load
  abstract: Callable[[DTypeLike | None], dict[str, Any]]
