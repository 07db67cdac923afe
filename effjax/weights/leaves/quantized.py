"""Integer codes with scales: int8, or fewer bits packed into bytes.

The weight is `(codes - zero) * scale + offset`, one scale, zero point and offset per
group of consecutive inputs and per output. Sub-byte codes are packed into uint8 along
the contracted axis, because JAX holds an int4 in a whole byte on the CPU.

Scales and offsets may be leaves themselves: small integers with a scale for several of
them (`TwoLevel`). An offset that a format subtracts is held with the sign of its own
scale turned, which is exact: `a - d * m` and `a + (-d) * m` are the same float, and no
user of the leaf has to ask for a sign.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.ops.matmul import packing, rounding
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs
from effjax.weights.leaves import _activated, two_level

ACTIVATIONS = ("none", "int8", "int4")
BITS = (2, 3, 4, 5, 6, 8)


@leaf_lib.register
@dataclasses.dataclass(frozen=True)
class Quantized(leaf_lib.Leaf):
  """A matrix `[*stack, in, out]` or embedding `[V, D]` held as integer codes.

  Attributes:
    codes: int8, or uint8 with several codes a byte along `axis`.
    scale: floating point, or a leaf; the size of `axis` is the number of groups.
    zero: zero points like `scale`, or None.
    bits: bits a code, one of BITS.
    size: logical length of the contracted axis.
    axis: the contracted axis of the arrays as they are held: -2, or -1 for an embedding
      or for a swapped matrix.
    swapped: 1 if a matrix is held `[*stack, out, in]`, which integer products on a CPU
      read as it lies, while `[in, out]` is rearranged by every call.
    activations: "int8" or "int4" also rounds the activations and executes an integer
      product (ops.matmul.activations); sub-byte codes are unpacked to int8 for it in
      every call. "none" multiplies in the activations' dtype.
    logical_dtype: dtype of `dense()`, which computes in float32 at least.
    offset: what is added to each group, like `scale`, or None. Without zero points and
      offsets codes are signed, with either they start at 0.
    x_scale: the activations' static scale, float32 `[*stack, 1, 1]`; None if each token
      has its own.
  """

  static_fields = ("bits", "size", "axis", "swapped", "activations", "logical_dtype")

  codes: Any
  scale: Any
  zero: Any
  bits: int
  size: int
  axis: int = -2
  swapped: int = 0
  activations: str = "none"
  logical_dtype: str = "float32"
  offset: Any = None
  x_scale: Any = None

  @classmethod
  def create(
    cls,
    codes: jax.Array,
    scale: Any,
    zero: jax.Array | None = None,
    offset: Any = None,
    *,
    bits: int,
    axis: int = -2,
    swapped: bool = False,
    activations: str = "none",
    x_scale: jax.Array | None = None,
    dtype: Any = jnp.float32,
  ) -> "Quantized":
    """Packs unpacked integer codes and checks that everything fits.

    With rounded activations a matrix is held swapped, however it is given.

    Args:
      codes: integers of the logical shape, or with `swapped` of the held one; signed
        without zero points and offsets, else unsigned.
      scale: groups along `axis`, otherwise the shape of `codes`; an array or a leaf
        with the same `axis`.
      zero: an array like `scale`, or None.
      offset: like `scale`, array or leaf, or None.
      bits: one of BITS.
      axis: contracted axis of the parts as they are given, -2 or -1.
      swapped: the parts are those of a matrix, given as `[*stack, out, in]` with axis
        -1, and held like that.
      activations: one of ACTIVATIONS.
      x_scale: their static scale `[*stack, 1, 1]`, or None for dynamic ones.
      dtype: logical dtype.

    Raises:
      InputError: the parts do not fit together.
    """
    config.require(bits in BITS, f"bits={bits} must be one of {BITS}")
    config.require(axis in (-1, -2), f"axis={axis} must be -2 or -1")
    config.require(
      activations in ACTIVATIONS,
      f"activations={activations!r} must be one of {', '.join(ACTIVATIONS)}",
    )
    config.require(not swapped or axis == -1, "a swapped matrix is given with axis=-1")
    parts = {"scale": scale, "zero": zero, "offset": offset}
    _check_parts(parts, codes.shape, axis)
    symmetric = zero is None and offset is None
    config.require(
      activations == "none" or (scale.shape[axis] == 1 and symmetric),
      f"{activations} activations need one symmetric scale per output channel "
      "(group=0)",
    )
    _activated.check_x_scale(x_scale, codes.shape, activations)
    size = codes.shape[axis]
    if activations != "none" and axis == -2:
      config.require(
        not leaf_lib.is_leaf_kind(scale),
        f"{activations} activations hold a matrix [out, in]: give scales that are a "
        "leaf swapped",
      )
      axis, swapped = -1, True
      codes, parts["scale"] = (jnp.swapaxes(p, -1, -2) for p in (codes, scale))
    if bits < 8:
      codes = packing.pack_bits(codes, bits, axis=axis)
    else:
      codes = codes.astype(jnp.int8 if symmetric else jnp.uint8)
    return cls(
      codes,
      **parts,
      bits=bits,
      size=size,
      axis=axis,
      swapped=int(swapped),
      activations=activations,
      logical_dtype=jnp.dtype(dtype).name,
      x_scale=x_scale,
    )

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    shape = list(self.codes.shape)
    shape[self.axis] = self.size
    return tuple(self._swap(shape))

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype."""
    return jnp.dtype(self.logical_dtype)

  @property
  def num_groups(self) -> int:
    """Groups along the contracted axis (count)."""
    return self.scale.shape[self.axis]

  @property
  def symmetric(self) -> bool:
    """Whether the weight is only `codes * scale`."""
    return self.zero is None and self.offset is None

  def unpacked(self) -> jax.Array:
    """The codes as held, one an element: int8 if symmetric, else uint8."""
    if self.bits == 8:
      return self.codes
    return packing.unpack_bits(
      self.codes, self.bits, self.size, signed=self.symmetric, axis=self.axis
    )

  def dense(self) -> jax.Array:
    """`(codes - zero) * scale + offset`."""
    parts = [self.unpacked(), self.scale, self.zero, self.offset]
    codes, scale, zero, offset = map(self._as_columns, parts)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    dense = rounding.dequantize_groups(codes, scale, zero, dtype=wide)
    if offset is not None:
      group = self.size // self.num_groups
      dense += jnp.repeat(offset.astype(wide), group, axis=-2)
    dense = (dense if self.axis == -2 else dense[..., 0]).astype(self.dtype)
    return jnp.swapaxes(dense, -1, -2) if self.swapped else dense

  def contract(self, x: jax.Array, *, transpose: bool = False) -> jax.Array:
    """Scales after the product where one scale serves a whole output channel."""
    held_axis = -1 if transpose != bool(self.swapped) else -2
    if self.activations != "none":
      return _activated.contract(self, x, axis=held_axis)
    per_channel = self.num_groups == 1 and self.symmetric
    if not per_channel or self.axis != held_axis or self.codes.ndim != 2:
      w = self.dense()
      # XLA's CPU backend dequantizes inside the product of one row only where axis -2
      # is contracted: turned around, a tied head is up to three times as fast.
      w = jnp.swapaxes(w, -1, -2) if transpose else w
      return leaf_lib.contract_dense(x, w, transpose=False)
    out_first = held_axis == -1
    scale_1F = verbs.dense(self.scale).reshape(1, -1)
    codes = self.unpacked()
    y = leaf_lib.contract_dense(x, codes, transpose=out_first)
    scale = jax.lax.expand_dims(scale_1F[0], tuple(range(y.ndim - 1)))
    return y * scale.astype(y.dtype)

  def grouped_contract(
    self, x: jax.Array, group_sizes: jax.Array | None = None
  ) -> jax.Array:
    """See weights.verbs.grouped_contract."""
    if self.activations == "none":
      return super().grouped_contract(x, group_sizes)
    return _activated.contract(self, x, group_sizes, axis=-1 if self.swapped else -2)

  def lookup(self, ids: jax.Array) -> jax.Array:
    """Gathers rows of codes, scales and offsets, then dequantizes only those."""
    if self.axis != -1 or self.swapped:
      return super().lookup(ids)
    # Every array is cut along the last axis only, also inside scales that are leaves.
    own = dataclasses.replace(self, x_scale=None)
    rows = jax.tree.map(lambda part: jnp.take(part, ids.reshape(-1), axis=0), own)
    return rows.dense().reshape(*ids.shape, self.size)

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Codes, scales, zero points and offsets inherit the axes they tile.

    With one group, the contracted dimension of the scales has size one: replicated.
    """
    held = self._swap(list(axes))
    tiled = list(held)
    if self.num_groups == 1:
      tiled[self.axis] = None
    parts = {"scale": self.scale, "zero": self.zero, "offset": self.offset}
    inner = {n: None if p is None else tuple(tiled) for n, p in parts.items()}
    return {
      "codes": tuple(held),
      **inner,
      "x_scale": _activated.scale_axes(self, axes),
    }

  def _as_columns(self, part: Any) -> jax.Array | None:
    """A part as a plain array `[..., in or groups, out or 1]`."""
    if part is None:
      return None
    part = verbs.dense(part)
    # A last axis of one: rows are cut into groups as columns are, nothing is moved.
    return part if self.axis == -2 else part[..., None]

  def _swap(self, dims: list[Any]) -> list[Any]:
    """Dimensions between the held and the logical order."""
    return [*dims[:-2], dims[-1], dims[-2]] if self.swapped else dims


def _check_parts(parts: dict[str, Any], shape: tuple[int, ...], axis: int) -> None:
  """Raises InputError unless scales, zero points and offsets tile codes of `shape`."""
  groups = parts["scale"].shape
  config.require(
    two_level.tiles(groups, shape, axis),
    f"scales of shape {tuple(groups)} do not tile codes of shape {tuple(shape)}: they "
    f"must divide axis {axis} and be equal on the others",
  )
  for name, part in parts.items():
    if part is None:
      continue
    config.require(
      tuple(part.shape) == tuple(groups),
      f"{name} of shape {tuple(part.shape)} beside scales of shape {tuple(groups)}",
    )
    config.require(
      not leaf_lib.is_leaf_kind(part) or getattr(part, "axis", None) == axis,
      f"{name} as a leaf must be held along axis={axis}, as the codes are",
    )
