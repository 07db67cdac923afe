"""Codes of 4 or 8 bits that stand for fixed values: small floats and normal quantiles.

| table  | values                                              | nearest, ties        |
|--------|-----------------------------------------------------|----------------------|
| "nf4"  | 16 quantiles of a normal distribution, -1 to 1      | to the lower         |
| "e2m1" | 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives      | to the even code     |
| "e4m3" | float8_e4m3fn: up to 448, no infinities             | to the even code     |
| "e5m2" | float8_e5m2: up to 57344                            | to the even code     |
| "e8m0" | powers of two, from 2^-127 to 2^127                 | (see `power_of_two`) |

Sources: Dettmers et al. 2023, arXiv:2305.14314, appendix E (NF4; the constants are
those of bitsandbytes); OCP 8-bit Floating Point Specification 1.0; OCP Microscaling
Formats Specification 1.0, sections 5.3 and 5.4 (e2m1, e8m0). Codes are bit patterns, of
NF4 the place among the sorted values. Values beyond the largest become the largest.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from effjax.core import errors
from effjax.ops.matmul import rounding

NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FLOATS = {
  "e2m1": ml_dtypes.float4_e2m1fn,
  "e4m3": ml_dtypes.float8_e4m3fn,
  "e5m2": ml_dtypes.float8_e5m2,
  "e8m0": ml_dtypes.float8_e8m0fnu,
}
BITS = {"nf4": 4, "e2m1": 4, "e4m3": 8, "e5m2": 8, "e8m0": 8}
LARGEST = {"nf4": 1.0, "e2m1": 6.0, "e4m3": 448.0, "e5m2": 57344.0}
# The exponent of the largest value: what a block's own exponent is lowered by.
LARGEST_EXPONENT = {"e2m1": 2, "e4m3": 8, "e5m2": 15}
_MANTISSA_BITS = {"e2m1": 1, "e4m3": 3, "e5m2": 2}
RULES = ("floor", "rceil", "even", "ceil")
_BIAS = 127


def values(table: str) -> np.ndarray:
  """The value of every code, float32; what is no number is NaN.

  Raises:
    InputError: there is no such table.
  """
  if table not in BITS:
    raise errors.unknown("table of codes", table, BITS)
  if table == "nf4":
    return np.array(NF4, np.float32)
  codes = np.arange(2 ** BITS[table], dtype=np.uint8)
  return codes.view(_FLOATS[table]).astype(np.float32)


def decode(codes: jax.Array, table: str) -> jax.Array:
  """The values of codes, float32.

  Args:
    codes: uint8, one an element.
    table: one of BITS.
  """
  if table in ("nf4", "e2m1"):
    return jnp.take(jnp.asarray(values(table)), codes, mode="clip")
  as_float = jax.lax.bitcast_convert_type(codes, jnp.dtype(_FLOATS[table]))
  return as_float.astype(jnp.float32)


def encode(x: jax.Array, table: str) -> jax.Array:
  """The code of the nearest value, uint8.

  Args:
    x: floating; what is no number has no code that means anything.
    table: one of BITS but "e8m0".
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if BITS[table] == 8:
    x = jnp.clip(x, -LARGEST[table], LARGEST[table])
    as_float = rounding.narrowed(x.astype(jnp.float32), _FLOATS[table])
    return jax.lax.bitcast_convert_type(as_float, jnp.uint8)
  points, codes = _sorted(table)
  middles = (points[1:].astype(np.float64) + points[:-1]) / 2
  if table == "nf4":  # As bitsandbytes compares: with the middle rounded to float32.
    middles = middles.astype(np.float32)
  place = jnp.zeros(x.shape, jnp.uint8)
  for below, middle in enumerate(middles):
    to_upper = table != "nf4" and codes[below + 1] % 2 == 0
    middle = np.asarray(middle, x.dtype)
    place += (x >= middle if to_upper else x > middle).astype(jnp.uint8)
  return jnp.take(jnp.asarray(codes), place)


def neighbours(x: jax.Array, table: str) -> tuple[jax.Array, jax.Array]:
  """Codes of the largest value at most x, and of the smallest at least x, uint8.

  Beyond the ends both are the end.
  """
  points, codes = _sorted(table)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  grid = jnp.asarray(points).astype(x.dtype)
  low = jnp.clip(jnp.searchsorted(grid, x, side="right") - 1, 0, len(points) - 1)
  high = jnp.clip(jnp.searchsorted(grid, x, side="left"), 0, len(points) - 1)
  ordered = jnp.asarray(codes)
  return jnp.take(ordered, low), jnp.take(ordered, high)


def power_of_two(absmax: jax.Array, table: str, rule: str) -> jax.Array:
  """The shared exponent of blocks, as an "e8m0" code: uint8, 2^(code - 127).

  Rules, for the largest magnitude m of a block and the table's largest value M:
  "floor" 2^(floor(log2 m) - floor(log2 M)), the specification's; "even", the same after
  m was rounded to the table's mantissa; "ceil" rounds log2 m up instead; "rceil"
  2^ceil(log2(m / M)), so that nothing is cut.

  Args:
    absmax: of each block, not negative, float32.
    table: of the values that are scaled.
    rule: one of RULES.

  Raises:
    InputError: there is no such rule.
  """
  if rule not in RULES:
    raise errors.unknown("scale_rule", rule, RULES)
  m = absmax.astype(jnp.float32)
  if rule == "even":
    # Half a unit of the last bit that stays; carries go into the exponent.
    bits = jax.lax.bitcast_convert_type(m, jnp.uint32)
    half = np.uint32(1 << (22 - _MANTISSA_BITS[table]))
    m = jax.lax.bitcast_convert_type(bits + half, jnp.float32)
  fraction, exponent = jnp.frexp(m)  # m = fraction * 2^exponent, fraction from 1/2
  if rule == "rceil":
    # Without dividing, which would lose the smallest blocks.
    top_fraction, top = np.frexp(LARGEST[table])
    exponent += (fraction > np.float32(top_fraction)) - int(top)
  else:
    exponent -= 1 + LARGEST_EXPONENT[table]  # floor(log2 m), less the table's
    if rule == "ceil":
      exponent += fraction > 0.5
  code = jnp.clip(exponent + _BIAS, 0, 2 * _BIAS)
  return jnp.where(m > 0, code, _BIAS).astype(jnp.uint8)


@functools.cache
def _sorted(table: str) -> tuple[np.ndarray, np.ndarray]:
  """Every finite value once, ascending, and its code (that of +0 for zero)."""
  every = values(table)
  codes = np.flatnonzero(np.isfinite(every)).astype(np.uint8)
  codes = codes[(every[codes] != 0) | ~np.signbit(every[codes])]
  codes = codes[np.argsort(every[codes], kind="stable")]
  return every[codes], codes
