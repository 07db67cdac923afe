"""Key-value cache of integer codes: int8 or int4, full or over a window.

The grids are those of the format `int` (effjax.weights.formats), one for each group of
consecutive entries of a head, of one token: "int8" is symmetric with one scale for a
token and head, "int4" has zero points and groups of 32. Grids a token, as in the
group-wise quantization of FlexGen, Sheng et al. 2023, arXiv:2303.06865, section 5: a
token's codes are made once, from its exact keys and values, and never again.
Deviation from KIVI, Liu et al. 2024, arXiv:2402.02750, section 3: keys have grids a
token as values do, not a channel, which would need the last tokens to be kept as floats
until a group of them is full; so keys with outlying channels lose more here.

Attention without a state rounds keys and values in the same way (`HeadFormat.rounded`),
so that prefill and steps equal it; but an entry that lies between two codes up to an
error of float32 may then fall to either.

A head of K entries takes, in N groups, K bytes and a scale a group (int8), or K / 2
bytes, a scale and a zero point of one byte a group (int4): 8.25 and 4.75 bits an entry
for heads of 64. Scales are bfloat16, which has the range of float32: no head is too
small or too large for them, and a scale that rounds down cuts the largest of 8-bit
codes by a quarter of a step, less than rounding may cost anyway.

Laid out `[B, G, S, ...]` as `kv` does, and written by it; attention decodes one block
of slots at a time. B batch, G kv heads, S slots, K head size, N groups, L new tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from effjax.core import errors
from effjax.core.config import require
from effjax.nn.caches import kv
from effjax.nn.caches import window as window_cache
from effjax.ops.attention import api as attention_ops
from effjax.ops.attention import decode, patterns, streamed
from effjax.ops.matmul import packing, rounding
from effjax.weights.formats import base
from effjax.weights.formats import int as int_format

FORMATS = ("int8", "int4")
_INT4_GROUP = 32


@dataclasses.dataclass(frozen=True)
class HeadFormat:
  """How the vector of a head is held.

  Attributes:
    head_dim: K.
    numbers: the format of its entries; `group` divides K.
  """

  head_dim: int
  numbers: int_format.Int

  def encode(self, x: jax.Array) -> dict[str, jax.Array]:
    """Parts of vectors `[..., K]`: codes, scale (bits of bfloat16), maybe zero."""
    numbers = self.numbers
    x = base.split(x.astype(jnp.float32)[..., None], numbers.group)
    grid = numbers.fit(x)
    codes = base.merge(numbers.encode(x, grid))[..., 0]
    if numbers.bits < 8:
      codes = packing.pack_bits(codes, numbers.bits, axis=-1)
    # Its bits: XLA's CPU backend widens a whole array of bfloat16 to cut or write it.
    scale = jax.lax.bitcast_convert_type(grid.pop("scale"), jnp.uint16)
    grid = {"scale": scale, **grid}
    return {"codes": codes, **{name: p[..., 0, 0] for name, p in grid.items()}}

  def decode(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """The float32 values `[..., K]` of parts."""
    numbers = self.numbers
    codes, grid = parts["codes"], {n: p for n, p in parts.items() if n != "codes"}
    if numbers.bits < 8:
      codes = packing.unpack_bits(
        codes, numbers.bits, self.head_dim, signed=numbers.symmetric, axis=-1
      )
    codes = base.split(codes[..., None], numbers.group)
    grid = {name: part[..., None, None] for name, part in grid.items()}
    grid["scale"] = jax.lax.bitcast_convert_type(grid["scale"], jnp.bfloat16)
    return base.merge(numbers.decode(codes, grid))[..., 0]

  def rounded(self, x: jax.Array) -> jax.Array:
    """Vectors as they come out of the cache, with the gradient of x itself."""
    held = self.decode(self.encode(jax.lax.stop_gradient(x))).astype(x.dtype)
    return held + (x - jax.lax.stop_gradient(x))

  @property
  def num_bytes(self) -> int:
    """Bytes that one vector takes."""
    vector = jax.ShapeDtypeStruct((self.head_dim,), jnp.float32)
    parts = jax.eval_shape(self.encode, vector)
    return sum(part.size * part.dtype.itemsize for part in parts.values())


def head_format(name: str, head_dim: int, group: int | None = None) -> HeadFormat:
  """The format of a name, for heads of a size.

  Args:
    name: one of FORMATS.
    head_dim: K.
    group: consecutive entries that share a grid; 0 for the whole head, None for the
      whole head with int8 and the divisor of K nearest to 32 with int4.

  Raises:
    InputError: an unknown name, or a group that does not divide the head.
  """
  if name not in FORMATS:
    raise errors.unknown("format of a cache", name, FORMATS)
  if group is None:
    group = 0 if name == "int8" else rounding.nearest_group(head_dim, _INT4_GROUP)
  require(
    group >= 0 and (group == 0 or head_dim % group == 0),
    f"kv_group={group} must divide head_dim={head_dim}; the nearest that does is "
    f"{rounding.nearest_group(head_dim, group)} (0: the whole head)",
  )
  numbers = int_format.Int(
    bits=int(name.removeprefix("int")),
    symmetric=name == "int8",
    group=group or head_dim,
    scale_dtype="bfloat16",
  )
  return HeadFormat(head_dim, numbers)


@flax.struct.dataclass
class QuantizedCache:
  """Codes of the keys and values of the tokens seen so far.

  Attributes:
    k: parts `[B, G, S, ...]` of the keys, rotated; see HeadFormat.encode.
    v: of the values.
    length_B: tokens seen by each row, int32.
    rolling: whether slot p % S holds position p, and not p alone.
  """

  # Any, because pytrees are also built around shapes and other placeholders.
  k: Any
  v: Any
  length_B: Any
  rolling: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def num_slots(self) -> int:
    """S."""
    return self.k["codes"].shape[2]


def init(
  batch: int,
  num_kv_heads: int,
  num_slots: int,
  head: HeadFormat,
  *,
  rolling: bool = False,
) -> QuantizedCache:
  """An empty cache for `num_slots` tokens a row, or the last so many if rolling."""
  vectors = jax.ShapeDtypeStruct(
    (batch, num_kv_heads, num_slots, head.head_dim), jnp.float32
  )
  parts = jax.eval_shape(head.encode, vectors)
  empty = lambda: {n: jnp.zeros(p.shape, p.dtype) for n, p in parts.items()}
  return QuantizedCache(
    k=empty(), v=empty(), length_B=jnp.zeros((batch,), jnp.int32), rolling=rolling
  )


def append(
  cache: QuantizedCache,
  k_BLGK: jax.Array,
  v_BLGK: jax.Array,
  valid_BL: jax.Array,
  head: HeadFormat,
) -> QuantizedCache:
  """Encodes new tokens and writes them behind the old ones, or over the oldest.

  Args:
    cache: the cache; donate it, so that the update happens in place.
    k_BLGK, v_BLGK: exact keys and values of the new tokens.
    valid_BL: bool; padding, always to the right of a row's tokens, is not written. A
      token past the capacity is dropped too, if not rolling.
    head: as for `init`.
  """
  slots, length_B = cache.num_slots, cache.length_B
  positions_BL = length_B[:, None] + jnp.arange(valid_BL.shape[1])[None]
  grown_B = length_B + jnp.sum(valid_BL, axis=1, dtype=jnp.int32)
  if cache.rolling:
    kept_BL = valid_BL & (positions_BL >= grown_B[:, None] - slots)
  else:
    kept_BL = valid_BL & (positions_BL < slots)
  k, v = kv.write(
    (cache.k, cache.v),
    (head.encode(k_BLGK), head.encode(v_BLGK)),
    positions_BL % slots if cache.rolling else positions_BL,
    kept_BL,
  )
  return cache.replace(k=k, v=v, length_B=grown_B)


def attend(
  cache: QuantizedCache,
  q_BLHK: jax.Array,
  q_positions_BL: jax.Array,
  head: HeadFormat,
  *,
  pattern: patterns.Pattern,
  **extras: Any,
) -> jax.Array:
  """Attention of new tokens over a cache that holds them already.

  A long prompt over a full cache decodes all of it, once; otherwise one block of slots
  is decoded at a time.

  Args:
    cache: the cache; a rolling one of single new tokens.
    q_BLHK: queries.
    q_positions_BL: int32, their positions.
    head: as for `init`.
    pattern, extras: as for `effjax.ops.attention.api.cached_attention`.
  """
  num_groups, num_slots = cache.k["codes"].shape[1:3]
  dense = lambda parts: head.decode(parts).astype(q_BLHK.dtype)
  if decode.is_blockwise(q_BLHK.shape[1], num_slots):
    return attention_ops.cached_attention(
      q_BLHK,
      dense(cache.k),
      dense(cache.v),
      q_positions_BL,
      cache.length_B,
      pattern=pattern,
      **extras,
    )

  def read(start: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    cut = lambda part: jax.lax.dynamic_slice_in_dim(part, start, size, axis=2)
    k, v = jax.tree.map(cut, (cache.k, cache.v))
    return dense(k), dense(v)

  held = None
  if cache.rolling:
    held = window_cache.positions_of(cache.length_B, num_slots)
  return streamed.attention(
    q_BLHK,
    read,
    num_groups,
    num_slots,
    q_positions_BL,
    cache.length_B,
    kv_positions_BS=held,
    pattern=pattern,
    **extras,
  )


def attend_window(
  cache: QuantizedCache,
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGK: jax.Array,
  valid_BL: jax.Array,
  head: HeadFormat,
  *,
  pattern: patterns.Window,
  **extras: Any,
) -> tuple[jax.Array, QuantizedCache]:
  """Attention of new tokens over a rolling cache and themselves, and the new cache.

  Several tokens decode the whole cache, which is as long as the window.

  Args:
    cache: the tokens before these; donate it.
    q_BLHK, k_BLGK, v_BLGK: the new tokens, any number; keys and values exact.
    valid_BL: bool; padding is to the right of a row's tokens.
    head: as for `init`.
    pattern, extras: as for `effjax.nn.caches.window.attend`.

  Returns:
    y_BLHK in the dtype of q, anything finite at padding.
  """
  new = append(cache, k_BLGK, v_BLGK, valid_BL, head)
  if q_BLHK.shape[1] == 1:
    at_B1 = cache.length_B[:, None]
    return attend(new, q_BLHK, at_B1, head, pattern=pattern, **extras), new
  dense = lambda parts: head.decode(parts).astype(q_BLHK.dtype)
  before = window_cache.WindowCache(dense(cache.k), dense(cache.v), cache.length_B)
  y_BLHK, _ = window_cache.attend(
    before,
    q_BLHK,
    head.rounded(k_BLGK),
    head.rounded(v_BLGK),
    valid_BL,
    pattern=pattern,
    **extras,
  )
  return y_BLHK, new
