"""Quantized matrices with offsets and with scales that are leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors, partition
from effjax.weights import verbs
from effjax.weights.leaves import quantized, two_level

OUT, IN, GROUP = 6, 32, 8


def _nested(values, axis=-1):
  grid = list(values.shape)
  grid[axis] //= 2
  scale = jnp.full(grid, 2**-6, jnp.float16)
  return two_level.TwoLevel.create(values, scale, bits=6, signed=False, axis=axis)


@pytest.fixture
def parts(rng):
  """Everything an offset leaf is made of, along the last axis."""
  grid = (OUT, IN // GROUP)
  draw = lambda high, shape: jnp.asarray(rng.integers(0, high, shape))
  return {
    "codes": draw(32, (OUT, IN)),
    "scale": _nested(draw(64, grid)),
    "zero": draw(32, grid).astype(jnp.uint8),
    "offset": _nested(draw(64, grid)),
    "bits": 5,
    "axis": -1,
  }


def _expected(parts):
  spread = lambda part: np.repeat(np.asarray(verbs.dense(part), np.float32), GROUP, -1)
  codes = np.asarray(parts["codes"], np.float32)
  if parts.get("zero") is not None:
    codes = codes - spread(parts["zero"])
  dense = codes * spread(parts["scale"])
  if parts.get("offset") is not None:
    dense = dense + spread(parts["offset"])
  return dense


@pytest.mark.parametrize(
  "without", [(), ("zero",), ("offset",), ("zero", "nested"), ("nested",)]
)
def test_dense_is_the_formula(parts, without):
  parts = {k: v for k, v in parts.items() if k not in without}
  if "nested" in without:
    parts["scale"] = parts["scale"].dense().astype(jnp.float16)
    parts["offset"] = parts["offset"].dense().astype(jnp.float16)
  leaf = quantized.Quantized.create(**parts)
  assert leaf.shape == (OUT, IN) and leaf.num_groups == IN // GROUP
  assert leaf.unpacked().dtype == jnp.uint8 and not leaf.symmetric
  np.testing.assert_array_equal(leaf.dense(), _expected(parts))
  swapped = quantized.Quantized.create(**parts, swapped=True)
  assert swapped.shape == (IN, OUT)
  np.testing.assert_array_equal(swapped.dense(), _expected(parts).T)
  low = quantized.Quantized.create(**parts, dtype=jnp.bfloat16)
  # Rounded once, at the end.
  rounded = jnp.asarray(_expected(parts)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(low.dense(), rounded)


def test_one_group_with_an_offset_is_not_scaled_after_the_product(rng):
  leaf = quantized.Quantized.create(
    jnp.asarray(rng.integers(0, 256, (IN, OUT))),
    jnp.full((1, OUT), 0.01),
    offset=jnp.ones((1, OUT)),
    bits=8,
  )
  assert leaf.codes.dtype == jnp.uint8
  x = jnp.asarray(rng.standard_normal((3, IN)), jnp.float32)
  expected = x @ leaf.dense()
  np.testing.assert_allclose(verbs.contract(x, leaf), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("activations", quantized.ACTIVATIONS)
def test_one_nested_scale_a_channel_is_scaled_after_the_product(rng, activations):
  scale = two_level.TwoLevel.create(
    jnp.arange(1, OUT + 1)[:, None],
    jnp.full((OUT, 1), 2**-8, jnp.float16),
    bits=6,
    signed=False,
    axis=-1,
  )
  codes = jnp.asarray(rng.integers(-127, 128, (OUT, IN)))
  leaf = quantized.Quantized.create(
    codes, scale, bits=8, axis=-1, swapped=True, activations=activations
  )
  x = jnp.asarray(rng.standard_normal((3, IN)), jnp.float32)
  y = verbs.contract(x, leaf)
  # A step of 7 codes is as many times as wide as one of 127.
  limit = {"none": 1e-5, "int8": 2e-2, "int4": 2e-2 * 127 / 7}[activations]
  expected = x @ leaf.dense()
  assert jnp.max(jnp.abs(y - expected)) <= limit * jnp.max(jnp.abs(expected))


def test_lookup_gathers_rows_of_every_part(parts):
  leaf = quantized.Quantized.create(**parts)
  ids = jnp.array([[0, 5], [5, 2]])
  fn = lambda leaf, ids: verbs.lookup(leaf, ids)
  np.testing.assert_array_equal(fn(leaf, ids), leaf.dense()[ids])
  # No other row is unpacked: nothing in the program is as large as the table.
  jaxpr = jax.make_jaxpr(fn)(leaf, jnp.array([1]))
  sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
  assert max(sizes) <= 2 * IN


def test_axes_of_inner_arrays_and_what_trains(parts):
  leaf = quantized.Quantized.create(**parts, swapped=True)
  held = ("mlp", "embed")
  expected = dict.fromkeys(("codes", "scale", "zero", "offset"), held)
  expected["x_scale"] = None
  assert leaf.inner_axes(("embed", "mlp")) == expected
  trainable, frozen = partition.partition({"w": leaf}, {"w"})
  assert jax.tree.leaves(trainable) == []
  assert jax.tree.structure(partition.merge(trainable, frozen)["w"]) == (
    jax.tree.structure(leaf)
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"bits": 7}, "bits=7 must be one of"),
    ({"axis": -2, "swapped": True}, "swapped matrix is given with axis=-1"),
    ({"zero": jnp.ones((OUT, 2))}, "zero of shape .* beside scales"),
    ({"offset": jnp.ones((OUT, 1))}, "offset of shape .* beside scales"),
    ({"scale": jnp.ones((OUT, 5))}, "do not tile"),
    ({"scale": jnp.ones((1, 4))}, "do not tile"),
    ({"activations": "int8"}, "one symmetric scale per output channel"),
    ({"scale": _nested(jnp.ones((OUT, 4), int), axis=-2)}, "scale .* axis=-1"),
    ({"offset": _nested(jnp.ones((OUT, 4), int), axis=-2)}, "offset .* axis=-1"),
  ],
)
def test_what_does_not_fit_is_refused(parts, change, message):
  with pytest.raises(errors.InputError, match=message) as error:
    quantized.Quantized.create(**parts | change)
  assert "\n" not in str(error.value)


def test_int8_activations_need_nested_scales_as_they_are_held():
  scale = two_level.TwoLevel.create(
    jnp.ones((1, OUT), int), jnp.ones((1, OUT)), bits=6, signed=False, axis=-2
  )
  codes = jnp.ones((IN, OUT), jnp.int8)
  with pytest.raises(errors.InputError, match="give scales that are a leaf swapped"):
    quantized.Quantized.create(codes, scale, bits=8, activations="int8")
