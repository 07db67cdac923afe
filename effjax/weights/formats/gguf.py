"""The block formats of GGUF files, Q4_0 to Q6_K, as llama.cpp runs them.

Source: ggml-quants.c of llama.cpp. Blocks of 32 inputs with a float16 scale; or
K-quants, super-blocks of 256 whose sub-blocks' scales are small integers against one
float16. An export to GGUF writes what a leaf holds as it is, without rounding it again.

| variant | a weight is           | inputs | scales                   | bits a weight |
|---------|-----------------------|--------|--------------------------|---------------|
| q8_0    | d * code              | 32     | float16                  | 8.5           |
| q5_0    | d * code              | 32     | float16                  | 5.5           |
| q4_0    | d * code              | 32     | float16                  | 4.5           |
| q5_1    | d * code + m          | 32     | float16 each             | 6             |
| q4_1    | d * code + m          | 32     | float16 each             | 5             |
| q6_k    | d * s * code          | 16     | 8 bits, float16 for 16   | 6.5625        |
| q5_k    | d * s * code + m * t  | 32     | 6 bits, float16 for 8    | 5.5           |
| q4_k    | d * s * code + m * t  | 32     | 6 bits, float16 for 8    | 4.5           |
| q3_k    | d * s * code          | 16     | 6 bits, float16 for 16   | 3.4375        |
| q2_k    | d * s * code + m * t  | 16     | 4 bits, float16 for 16   | 2.625         |

Without an importance matrix, as `llama-quantize` does by default. Scales that float16
cannot hold are cut to its largest.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effjax.core import errors
from effjax.ops.matmul import rounding
from effjax.weights.formats import _gguf_plain, _gguf_search, base
from effjax.weights.leaves import quantized, two_level

_SUPER = 256
_LARGEST = 65504.0  # of float16
# About the largest value of any variant; the squares of a search do not overflow.
_LARGEST_WEIGHT = 2.0**28


class _Variant(NamedTuple):
  """A block format.

  Attributes:
    bits: of a code.
    group: inputs of a block, or of a sub-block of a K-quant.
    has_min: whether something is added; codes then start at 0.
    shared_bits: of a sub-block's scale; 0 where it is a float16 itself.
    trials: of the search for scale and minimum.
  """

  bits: int
  group: int = 32
  has_min: bool = False
  shared_bits: int = 0
  trials: _gguf_search.Trials | None = None

  @property
  def codes(self) -> tuple[int, int]:
    """The least and the largest code."""
    if self.has_min:
      return 0, 2**self.bits - 1
    half = 2 ** (self.bits - 1)
    return (1 - half if self.bits == 8 else -half), half - 1

  @property
  def shared(self) -> int:
    """Sub-blocks of a super-block."""
    return _SUPER // self.group


_TRIALS = {
  "q2_k": _gguf_search.Trials(start=-0.5, num_steps=15, absolute=True),
  "q4_k": _gguf_search.Trials(start=-1.0, num_steps=20),
  "q5_k": _gguf_search.Trials(start=-0.5, num_steps=15),
}
VARIANTS = {
  "q8_0": _Variant(8),
  "q5_0": _Variant(5),
  "q4_0": _Variant(4),
  "q5_1": _Variant(5, has_min=True),
  "q4_1": _Variant(4, has_min=True),
  "q6_k": _Variant(6, group=16, shared_bits=8),
  "q5_k": _Variant(5, has_min=True, shared_bits=6, trials=_TRIALS["q5_k"]),
  "q4_k": _Variant(4, has_min=True, shared_bits=6, trials=_TRIALS["q4_k"]),
  "q3_k": _Variant(3, group=16, shared_bits=6),
  "q2_k": _Variant(2, group=16, has_min=True, shared_bits=4, trials=_TRIALS["q2_k"]),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUF(base.Format):
  """Integer codes in the blocks of a GGUF tensor type.

  A grid has the parts `scale` (and `min`, which is added), float32 before they are
  stored in float16, once for each group; K-quants also `sub` (and `sub_min`), integers.

  Attributes:
    variant: a key of VARIANTS.
    group: inputs that share a scale; 0 stands for that of the variant, which has no
      other.
  """

  variant: str = "q4_0"

  def __post_init__(self):
    if self.variant not in VARIANTS:
      raise errors.unknown("variant", self.variant, VARIANTS)
    own = self._of.group
    if self.group not in (0, own):
      raise errors.InputError(
        f"group={self.group}: gguf {self.variant} has groups of {own}; leave group out"
      )
    object.__setattr__(self, "group", own)

  @property
  def static_grids(self) -> bool:
    """The scales of a super-block are rounded together."""
    return self._of.shared_bits > 0

  def group_of(self, in_dim: int) -> int:
    """Inputs that share a scale.

    Raises:
      InputError: the input axis is not whole blocks, or not whole super-blocks.
    """
    own = self._of
    block = _SUPER if own.shared_bits else own.group
    if in_dim % block:
      fits = [
        name
        for name, other in VARIANTS.items()
        if in_dim % (_SUPER if other.shared_bits else other.group) == 0
      ]
      raise errors.InputError(
        f"gguf {self.variant} has blocks of {block} inputs, which do not divide the "
        f"input axis of {in_dim}; "
        + (
          f"take {', '.join(fits)}"
          if fits
          else "no variant does; take another format, or leave this parameter out"
        )
      )
    return own.group

  def fit(
    self, x: jax.Array, outer: jax.Array | None = None, shrink: Any = 1.0
  ) -> dict[str, jax.Array]:
    """Scales, minima, and their integers; of whole super-blocks for a K-quant.

    `shrink` is a factor on the range of a block, or on the scale that was found for a
    sub-block before it is rounded.
    """
    del outer
    own, x = self._of, x.astype(jnp.float32)
    x = jnp.clip(x, -_LARGEST_WEIGHT, _LARGEST_WEIGHT)
    low, high = own.codes
    if not own.shared_bits:
      if own.has_min:
        return _gguf_plain.affine(x, high, shrink)
      return _gguf_plain.symmetric(x, low, high, shrink)
    if not own.has_min:
      search = _gguf_search.refined if own.bits == 3 else _gguf_search.symmetric
      found = search(x, low, high)
      scale, sub = _gguf_search.share_signed(found, own.shared, own.shared_bits, shrink)
      return {"scale": scale, "sub": sub}
    found, minimum = _gguf_search.affine(x, high, own.trials)
    rounded = [
      _gguf_search.share_positive(part, own.shared, own.shared_bits, shrink)
      for part in (found, -minimum)
    ]
    (scale, sub), (minimum, sub_min) = rounded
    return {"scale": scale, "sub": sub, "min": -minimum, "sub_min": sub_min}

  def encode(self, x: jax.Array, grid: base.Grid) -> jax.Array:
    """int8, or uint8 with a minimum.

    Of a K-quant the nearest. Otherwise as ggml: under scales that are not rounded to
    float16 yet, so that a weight halfway between two values may take either.
    """
    low, high = self._of.codes
    if self._of.shared_bits:
      return self._clipped(jnp.round(self._places(x, grid)))
    return self._clipped(_gguf_plain.encode(x.astype(jnp.float32), grid, low, high))

  def neighbours(self, x: jax.Array, grid: base.Grid) -> tuple[jax.Array, jax.Array]:
    """The two codes around each weight; both the end where it lies beyond."""
    places = self._places(x, grid)
    below, above = self._clipped(jnp.floor(places)), self._clipped(jnp.ceil(places))
    falling = _product(grid, "scale", "sub") < 0
    return jnp.where(falling, above, below), jnp.where(falling, below, above)

  def decode(self, codes: jax.Array, grid: base.Grid) -> jax.Array:
    """`scale * code + min`, in float32."""
    values = codes.astype(jnp.float32) * _product(grid, "scale", "sub")
    return values + _product(grid, "min", "sub_min") if "min" in grid else values

  def leaf(
    self,
    codes: jax.Array,
    grid: base.Grid,
    *,
    axis: int = -2,
    dtype: Any = jnp.float32,
  ) -> quantized.Quantized:
    """A Quantized leaf, held as a GGUF file is: one row an output."""
    rows = lambda part: jnp.swapaxes(part, -1, -2)

    def part(name: str, sub: str) -> Any:
      if name not in grid:
        return None
      halves = _half(grid[name])
      if sub not in grid:
        return base.held(halves, -1)
      return two_level.TwoLevel.create(
        base.held(grid[sub], -1),
        base.held(halves[..., :: self._of.shared, :, :], -1),
        bits=self._of.shared_bits,
        signed=not self._of.has_min,
        axis=-1,
      )

    return quantized.Quantized.create(
      rows(codes),
      part("scale", "sub"),
      offset=part("min", "sub_min"),
      bits=self._of.bits,
      axis=-1,
      swapped=axis == -2,
      dtype=dtype,
    )

  @property
  def _of(self) -> _Variant:
    return VARIANTS[self.variant]

  def _places(self, x: jax.Array, grid: base.Grid) -> jax.Array:
    """Where on the stored grid each weight lies, as a number of steps."""
    x = x.astype(jnp.float32)
    if "min" in grid:
      x = x - _product(grid, "min", "sub_min")
    step = _product(grid, "scale", "sub")
    return jnp.where(step == 0, 0, x / base.divisor(step))

  def _clipped(self, places: jax.Array) -> jax.Array:
    low, high = self._of.codes
    dtype = jnp.uint8 if self._of.has_min else jnp.int8
    return jnp.clip(places, low, high).astype(dtype)


def _product(grid: base.Grid, name: str, sub: str) -> jax.Array:
  """Scales or minima as a leaf computes them, float32."""
  whole = _half(grid[name]).astype(jnp.float32)
  return grid[sub].astype(jnp.float32) * whole if sub in grid else whole


def _half(scale: jax.Array) -> jax.Array:
  """float16, as it is stored."""
  return rounding.narrowed(jnp.clip(scale, -_LARGEST, _LARGEST), jnp.float16)


TECHNIQUE = GGUF
