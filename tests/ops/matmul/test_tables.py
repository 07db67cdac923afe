"""Tables of codes: constants of their sources, and rounding by brute force."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.core import errors
from effjax.ops.matmul import tables

FLOATS = {
  "e2m1": ml_dtypes.float4_e2m1fn,
  "e4m3": ml_dtypes.float8_e4m3fn,
  "e5m2": ml_dtypes.float8_e5m2,
}
ENCODED = ("nf4", *FLOATS)


def _points(table):
  """Values, all middles between two of them, and a few beyond the ends."""
  values = tables.values(table)
  values = np.unique(values[np.isfinite(values)])
  middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
  more = np.random.default_rng(0).normal(size=500).astype(np.float32) * values[-1] / 2
  near = np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, -np.inf)
  return np.concatenate([values, middles, *near, more, 2 * values[[0, -1]]])


def test_nf4_is_made_of_quantiles():
  # The recipe of the paper's appendix: 8 positive and 7 negative quantiles, and zero.
  from statistics import NormalDist

  offset = 1 - (1 / 32 + 1 / 30) / 2
  quantile = NormalDist().inv_cdf
  positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  values = np.sort([*positive, 0.0, *negative])
  np.testing.assert_allclose(tables.NF4, values / values.max(), atol=2e-7)


def test_e2m1_is_the_specifications_list():
  positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
  np.testing.assert_array_equal(
    tables.values("e2m1"), [*positive, *(-x for x in positive)]
  )
  ties = jnp.asarray([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
  found = tables.decode(tables.encode(ties, "e2m1"), "e2m1")
  np.testing.assert_array_equal(found, [0, 1, 1, 2, 2, 4, 4])


@pytest.mark.parametrize("table", FLOATS)
def test_floats_round_as_ml_dtypes(table):
  x = _points(table)
  largest = tables.LARGEST[table]
  expected = np.clip(x, -largest, largest).astype(FLOATS[table])
  codes = jnp.asarray(jax.jit(tables.encode, static_argnums=1)(jnp.asarray(x), table))
  found = np.asarray(tables.decode(codes, table))
  np.testing.assert_array_equal(found, expected.astype(np.float32))
  # Codes are bit patterns; of the two zeros any will do.
  same = np.asarray(codes) == expected.view(np.uint8)
  assert np.all(same | (found == 0))


@pytest.mark.parametrize("table", ENCODED)
def test_the_nearest_by_looking_at_all(table):
  x = np.clip(_points(table), -tables.LARGEST[table], tables.LARGEST[table])
  values = tables.values(table)
  values = values[np.isfinite(values)].astype(np.float64)
  found = np.asarray(
    tables.decode(tables.encode(jnp.asarray(x), table), table), np.float64
  )
  least = np.min(np.abs(x[:, None].astype(np.float64) - values[None]), axis=1)
  # bitsandbytes compares with middles that are rounded to float32.
  np.testing.assert_allclose(np.abs(found - x), least, atol=1e-7 * values.max())


@pytest.mark.parametrize("table", ENCODED)
def test_neighbours_enclose(table):
  x = np.clip(_points(table), -tables.LARGEST[table], tables.LARGEST[table])
  low, high = (
    np.asarray(tables.decode(code, table))
    for code in tables.neighbours(jnp.asarray(x), table)
  )
  values = tables.values(table)
  values = values[np.isfinite(values)]
  assert np.all((low <= x) & (x <= high))
  between = (values[None] > low[:, None]) & (values[None] < high[:, None])
  assert not between.any()
  exact = np.isin(x, values)
  np.testing.assert_array_equal(low[exact], x[exact])
  np.testing.assert_array_equal(high[exact], x[exact])
  beyond = jnp.asarray([-1e6, 1e6], jnp.float32)
  ends = [tables.decode(code, table) for code in tables.neighbours(beyond, table)]
  np.testing.assert_array_equal(ends[0], ends[1])


@settings(deadline=None, max_examples=200)
@given(m=st.floats(2.0**-100, 2.0**100, width=32), table=st.sampled_from(list(FLOATS)))
def test_powers_of_two_follow_their_rules(m, table):
  m = np.float32(m)
  largest, top = tables.LARGEST[table], tables.LARGEST_EXPONENT[table]
  mantissa_bits = {"e2m1": 1, "e4m3": 3, "e5m2": 2}[table]
  exponent = int(np.floor(np.log2(np.float64(m))))
  if 2.0**exponent > m:  # log2 may round up.
    exponent -= 1
  fraction = np.float64(m) / 2.0**exponent
  steps = fraction * 2**mantissa_bits
  carries = np.floor(steps + 0.5) >= 2 * 2**mantissa_bits
  expected = {
    "floor": exponent - top,
    "even": exponent - top + int(carries),
    "ceil": exponent - top + int(fraction > 1),
    "rceil": int(np.ceil(np.log2(np.float64(m) / largest))),
  }
  for rule, power in expected.items():
    code = int(tables.power_of_two(jnp.asarray(m), table, rule))
    assert code == np.clip(power + 127, 0, 254), rule
  assert float(tables.decode(jnp.uint8([[127, 130]]), "e8m0")[0, 1]) == 8.0


def test_zero_has_scale_one_and_ends_are_kept():
  zero = jnp.zeros(1)
  for rule in tables.RULES:
    assert int(tables.power_of_two(zero, "e2m1", rule)[0]) == 127
    tiny, huge = (
      int(tables.power_of_two(jnp.float32([x]), "e4m3", rule)[0]) for x in (2e-38, 3e38)
    )
    assert tiny == 0 and 240 <= huge <= 254


def test_unknown_names():
  with pytest.raises(errors.InputError, match="did you mean 'e4m3'"):
    tables.values("e4m4")
  with pytest.raises(errors.InputError, match="unknown scale_rule 'flor'"):
    tables.power_of_two(jnp.ones(1), "e2m1", "flor")
