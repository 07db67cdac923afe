"""Integer codes as ONNX's operators hold them, from leaves as they are or by rounding.

MatMulNBits (com.microsoft) holds a matrix `[out, blocks, block / 2]`: uint8, the even
input of a pair in the low half, 8 added to signed codes. MatMulInteger holds int8
`[in, out]`.

Letters: N outputs, K inputs, J groups or blocks of inputs, P bytes of a block.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import errors
from effjax.ops.matmul import rounding
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs

BLOCK = 32
_LEAST, _MOST = 16, 256
_ZERO = 8

# Compiled once a shape; as `rtn` compiles it, so that the scales are the same.
_round = jax.jit(
  rounding.quantize_groups, static_argnames=("bits", "group", "symmetric")
)
_unpacked = jax.jit(lambda leaf: (leaf.unpacked(), verbs.dense(leaf.scale)))


@dataclasses.dataclass(frozen=True)
class Int4:
  """What MatMulNBits reads.

  Attributes:
    codes_NJP: uint8, two codes a byte.
    scale_NJ: float32.
    zero: None for 8 everywhere, uint8 with two a byte, or float32 like `scale_NJ`.
    block: inputs a block, a power of two.
  """

  codes_NJP: np.ndarray
  scale_NJ: np.ndarray
  zero: np.ndarray | None
  block: int


@dataclasses.dataclass(frozen=True)
class Int8:
  """What MatMulInteger reads, and the scales of its columns.

  Attributes:
    codes_KN: int8.
    scale_N: float32.
  """

  codes_KN: np.ndarray
  scale_N: np.ndarray


def round_int4(w_KN: np.ndarray) -> Int4:
  """Rounds to nearest as `rtn` does with bits=4, group=32; the last block is filled."""
  rows = -w_KN.shape[0] % BLOCK
  padded = jnp.asarray(np.pad(w_KN, ((0, rows), (0, 0))))
  codes, scale, _ = _round(padded, bits=4, group=BLOCK, symmetric=True)
  codes_NK = np.asarray(codes, np.int8).T[:, : len(w_KN)]
  return _int4(codes_NK + _ZERO, np.asarray(scale, np.float32).T, None, BLOCK)


def round_int8(w_KN: np.ndarray) -> Int8:
  """Rounds to nearest as `rtn` does with its default options."""
  codes, scale, _ = _round(jnp.asarray(w_KN), bits=8, group=0, symmetric=True)
  return Int8(np.asarray(codes), np.asarray(scale, np.float32)[0])


def int4(leaf: Any, transpose: bool) -> Int4:
  """The codes of a leaf, not one of them changed.

  Args:
    leaf: a `Quantized` matrix.
    transpose: whether its last axis is contracted, as a tied head does.

  Raises:
    InputError: MatMulNBits cannot hold it; says why.
  """
  _require_codes(leaf, 4, transpose)
  if leaf.activations != "none":
    raise errors.InputError(
      f"its activations are {leaf.activations}, MatMulNBits takes floats"
    )
  if leaf.offset is not None:
    raise errors.InputError("it has offsets, MatMulNBits has zero points only")
  size = leaf.size // leaf.num_groups
  if leaf.num_groups == 1:
    # One scale for all inputs: repeated, whatever their number.
    block, repeats = BLOCK, -(-leaf.size // BLOCK)
  else:
    # The largest power of two that divides a group: its scale is repeated, if need be.
    block = min(size & -size, _MOST)
    repeats = size // block
  if block < _LEAST:
    raise errors.InputError(
      f"it has groups of {size}, MatMulNBits blocks of a power of two from {_LEAST} on"
    )
  parts = (*_unpacked(leaf), leaf.zero)
  codes_NK, scale_NJ, zero_NJ = (_rows(part, leaf.axis) for part in parts)
  scale_NJ = np.repeat(scale_NJ.astype(np.float32), repeats, axis=1)
  if zero_NJ is None:
    return _int4(codes_NK + _ZERO, scale_NJ, None, block)
  return _int4(codes_NK, scale_NJ, np.repeat(zero_NJ, repeats, axis=1), block)


def int8(leaf: Any, transpose: bool) -> Int8:
  """The codes of a leaf, not one of them changed; see `int4`.

  Raises:
    InputError: MatMulInteger cannot hold it; says why.
  """
  _require_codes(leaf, 8, transpose)
  if leaf.activations == "int4" or leaf.x_scale is not None:
    kind = leaf.activations if leaf.x_scale is None else "of a static scale"
    raise errors.InputError(
      f"its activations are {kind}, DynamicQuantizeLinear makes 8 bits of a dynamic one"
    )
  if leaf.num_groups != 1 or not leaf.symmetric:
    raise errors.InputError(
      f"it has {leaf.num_groups} groups of inputs"
      + ("" if leaf.symmetric else " with zero points or offsets")
      + ", MatMulInteger one symmetric scale an output (group=0)"
    )
  codes_NK = _rows(leaf.codes, leaf.axis)
  scale_NJ = _rows(verbs.dense(leaf.scale), leaf.axis)
  return Int8(codes_NK.T, scale_NJ[:, 0].astype(np.float32))


def describe(leaf: Any) -> str:
  """A leaf in words, for messages: its kind, and bits if it has some."""
  bits = getattr(leaf, "bits", None)
  words = leaf.kind.replace("_", " ") if leaf_lib.is_leaf_kind(leaf) else "plain"
  return words if bits is None else f"{words} to {bits} bits"


def _require_codes(leaf: Any, bits: int, transpose: bool) -> None:
  """Raises InputError unless it is codes of so many bits along the inputs."""
  if leaf.kind != "quantized" or leaf.bits != bits:
    raise errors.InputError(f"only codes of {bits} bits are written as they are")
  held_axis = -1 if transpose != bool(leaf.swapped) else -2
  if leaf.axis != held_axis:
    raise errors.InputError("its groups lie along its outputs")


def _rows(part: Any, axis: int) -> np.ndarray | None:
  """A part of a leaf with the outputs first."""
  if part is None:
    return None
  array = np.asarray(part)
  return array if axis == -1 else array.T


def _int4(
  codes_NK: np.ndarray, scale_NJ: np.ndarray, zero_NJ: np.ndarray | None, block: int
) -> Int4:
  """Packs codes from 0 to 15."""
  num_outputs, num_blocks = scale_NJ.shape
  fill = num_blocks * block - codes_NK.shape[1]
  codes = np.pad(codes_NK.astype(np.uint8), ((0, 0), (0, fill)))
  packed = _pairs(codes).reshape(num_outputs, num_blocks, block // 2)
  if zero_NJ is not None:
    whole = (zero_NJ >= 0) & (zero_NJ <= 15) & (zero_NJ == np.round(zero_NJ))
    if np.all(whole):
      zero = zero_NJ.astype(np.uint8)
      zero_NJ = _pairs(np.pad(zero, ((0, 0), (0, num_blocks % 2))))
    else:
      zero_NJ = zero_NJ.astype(np.float32)
  return Int4(packed, np.ascontiguousarray(scale_NJ, np.float32), zero_NJ, block)


def _pairs(codes: np.ndarray) -> np.ndarray:
  """Two neighbours of the last axis in one byte, the first in its low half."""
  return codes[..., ::2] | (codes[..., 1::2] << 4)
