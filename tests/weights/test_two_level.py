"""Scales in two levels: what they stand for, how they are held, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.weights.leaves import two_level


def _parts(rng, shape=(3, 16), axis=-1, *, bits=6, signed=False, group=8):
  low = -(2 ** (bits - 1)) if signed else 0
  codes = rng.integers(low, low + 2**bits, shape)
  grid = list(shape)
  grid[axis] //= group
  return codes, rng.standard_normal(grid).astype(np.float16)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(
  ("bits", "signed"), [(4, True), (5, False), (6, False), (8, 1)]
)
def test_values_are_the_float32_products(rng, bits, signed, axis):
  shape = (2, 3, 16) if axis == -1 else (2, 16, 3)
  codes, scale = _parts(rng, shape, axis, bits=bits, signed=signed)
  leaf = two_level.TwoLevel.create(
    jnp.asarray(codes), jnp.asarray(scale), bits=bits, signed=bool(signed), axis=axis
  )
  assert leaf.shape == shape and leaf.group == 8
  assert leaf.dtype == jnp.float32 == leaf.dense().dtype
  np.testing.assert_array_equal(leaf.unpacked(), codes)
  expected = codes.astype(np.float32) * np.repeat(scale.astype(np.float32), 8, axis)
  np.testing.assert_array_equal(leaf.dense(), expected)
  assert leaf.held_bytes() == 96 * bits // 8 + 12 * 2


def test_the_dtype_of_codes_says_the_sign(rng):
  codes, scale = _parts(rng, bits=8, signed=False)
  make = lambda signed: two_level.TwoLevel.create(
    jnp.asarray(codes), jnp.asarray(scale), bits=8, signed=signed, axis=-1
  )
  assert make(False).codes.dtype == jnp.uint8
  assert make(True).codes.dtype == jnp.int8
  np.testing.assert_array_equal(make(False).unpacked(), codes)


def test_axes_of_inner_arrays(rng):
  codes, scale = map(jnp.asarray, _parts(rng))
  leaf = two_level.TwoLevel.create(codes, scale, bits=6, signed=False, axis=-1)
  wide = ("mlp", "embed")
  assert leaf.inner_axes(wide) == {"codes": wide, "scale": wide}
  leaf = two_level.TwoLevel.create(codes, scale[:, :1], bits=6, signed=False, axis=-1)
  assert leaf.inner_axes(wide) == {"codes": wide, "scale": ("mlp", None)}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"bits": 7}, "bits=7 must be one of"),
    ({"axis": 0}, "axis=0 must be -2 or -1"),
    ({"axis": -2}, "do not tile codes .* along axis -2"),
    ({"scale": jnp.ones((3, 5), jnp.float16)}, "do not tile"),
    ({"scale": jnp.ones((2, 2), jnp.float16)}, "do not tile"),
    ({"scale": jnp.ones((2,), jnp.float16)}, "do not tile"),
    ({"scale": jnp.ones((3, 2), jnp.int8)}, "must be integers with floating-point"),
    ({"codes": jnp.ones((3, 16))}, "must be integers with floating-point"),
  ],
)
def test_what_does_not_fit_is_refused(rng, change, message):
  codes, scale = map(jnp.asarray, _parts(rng))
  parts = {"codes": codes, "scale": scale, "bits": 6, "signed": False, "axis": -1}
  with pytest.raises(errors.InputError, match=message) as error:
    two_level.TwoLevel.create(**parts | change)
  assert "\n" not in str(error.value)
