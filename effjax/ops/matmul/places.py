"""Where the kept weights of a sparse matrix are: a bit each, or compressed rows (CSR).

The kept weights of a matrix `[R, C]` stand in a flat list, row after row. A *bitmap*
says with one bit a weight which those are; *CSR* gives where the list leaves each row,
and each kept weight's column. With columns of 8, 16 or 32 bits CSR is the smaller one
below a density of 1/8, 1/16 or 1/32, less what the ends of the rows take.

Stacked matrices hold lists of one length, that of the longest, rounded up to PADDING.
What only fills a list up counts like everything else.

Letters: R rows, C columns, K length of a list.
"""

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.config import require
from effjax.core.errors import unknown
from effjax.ops.matmul import packing

LAYOUTS = ("bitmap", "csr")
# Lists of whole eights: codes of any width fill bytes, and eight devices get shares.
PADDING = 8


def padded(count: int) -> int:
  """The length of a list of `count` kept weights; never empty."""
  return max(-(-count // PADDING), 1) * PADDING


def index_dtype(largest: int) -> jnp.dtype:
  """The smallest unsigned integer that holds `largest`."""
  names = ("uint8", "uint16", "uint32")
  return next(jnp.dtype(n) for n in names if largest <= jnp.iinfo(n).max)


def place_bytes(layout: str, rows: int, cols: int, count: int) -> int:
  """Bytes that the places in one matrix take, for lists of `padded(count)`."""
  if layout == "bitmap":
    return rows * -(-cols // 8)
  column, end = index_dtype(cols - 1), index_dtype(count)
  return padded(count) * column.itemsize + rows * end.itemsize


def smallest(rows: int, cols: int, count: int) -> str:
  """The layout that takes fewer bytes; the bitmap of two that are equal."""
  return min(LAYOUTS, key=lambda name: place_bytes(name, rows, cols, count))


def check(layout: str, shape: tuple[int, ...]) -> None:
  """Raises InputError unless there is such a layout, of matrices of such a shape."""
  if layout not in LAYOUTS:
    raise unknown("layout", layout, LAYOUTS)
  require(
    shape[-2] * shape[-1] < 2**31,
    f"a matrix of {shape[-2]}x{shape[-1]} has more places than 32 bits can count",
  )


def find(mask: jax.Array, count: int) -> jax.Array:
  """Flat places of what a mask `[R, C]` keeps, rising, int32 `[padded(count)]`.

  What fills the list up is R * C, which is no place.
  """
  flat = mask.reshape(-1)
  return jnp.nonzero(flat, size=padded(count), fill_value=flat.size)[0]


def to_csr(mask: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Ends of the rows `[R]` and columns `[padded(count)]` of a mask `[R, C]`."""
  ends = jnp.cumsum(jnp.sum(mask, axis=-1, dtype=jnp.int32))
  cols = mask.shape[-1]
  places = find(mask, count)
  columns = jnp.where(places < mask.size, places % cols, 0)
  return ends.astype(index_dtype(count)), columns.astype(index_dtype(cols - 1))


def from_csr(ends: jax.Array, columns: jax.Array, cols: int) -> jax.Array:
  """Flat places as `find` gives them; what fills the list up is R * C or more."""
  # Each end moves everything behind it one row on.
  steps = jnp.zeros(columns.shape, jnp.int32)
  steps = steps.at[ends.astype(jnp.int32)].add(1, mode="drop")
  return jnp.cumsum(steps) * cols + columns.astype(jnp.int32)


def gather(flat: jax.Array, places: jax.Array) -> jax.Array:
  """The entries of a flat matrix at some places, zeros for those that are none."""
  return jnp.take(flat, places, mode="fill", fill_value=0)


def scatter(kept: jax.Array, places: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """A list at its places in a matrix of zeros."""
  flat = jnp.zeros(shape[0] * shape[1], kept.dtype)
  return flat.at[places].set(kept, mode="drop").reshape(shape)


def spread(kept: jax.Array, mask_bits: jax.Array, cols: int) -> jax.Array:
  """A list where the bits of a mask `[R, ceil(C / 8)]` are 1, zeros elsewhere.

  Gathered, not scattered: each weight finds its own, all at once. How many come before
  it is counted in three steps, of which the long one goes over bytes, not bits.
  """
  in_bytes = jax.lax.population_count(mask_bits).astype(jnp.int32)
  through = jnp.cumsum(in_bytes, axis=-1)
  in_rows = through[:, -1]
  before_rows = jnp.cumsum(in_rows) - in_rows
  before_bytes = before_rows[:, None] + through - in_bytes
  lower = np.array([[(1 << bit) - 1 for bit in range(8)]], np.uint8)[None]
  before_bits = jax.lax.population_count(mask_bits[..., None] & lower)
  order = before_bytes[..., None] + before_bits.astype(jnp.int32)
  order = order.reshape(len(mask_bits), -1)[:, :cols]
  taken = jnp.take(kept, order, mode="clip")
  mask = packing.unpack_mask(mask_bits, cols)
  return jnp.where(mask, taken, jnp.zeros((), kept.dtype))
