"""Descriptions of leaves: there and back, by way of JSON, and what is refused."""

import json

import jax
import jax.numpy as jnp
import pytest

from effjax.core import errors
from effjax.weights import describe
from effjax.weights.leaves import masked, quantized


def _leaf():
  codes = jnp.ones((2, 8, 4), jnp.int8)
  inner = quantized.Quantized.create(
    codes, jnp.ones((2, 2, 4)), bits=4, dtype=jnp.bfloat16
  )
  return masked.Masked.create(inner, jnp.ones((2, 8, 4), bool))


def test_a_plain_array_in_full():
  array = jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)
  described = describe.describe(array)
  assert described == {"kind": "array", "shape": [3, 5], "dtype": "bfloat16"}
  assert describe.abstract(described, "w") == array


def test_nested_leaves_survive_json():
  leaf = _leaf()
  described = json.loads(json.dumps(describe.describe(leaf)))
  assert described["kind"] == "masked"
  assert described["data"]["values"]["static"]["bits"] == 4
  assert described["data"]["values"]["data"]["zero"] is None
  back = describe.abstract(described, "w")
  expected = jax.eval_shape(lambda: leaf)
  assert jax.tree.structure(back) == jax.tree.structure(expected)
  assert jax.tree.leaves(back) == jax.tree.leaves(expected)
  assert back.shape == leaf.shape and back.dtype == leaf.dtype


def test_a_missing_field_takes_its_default():
  leaf = _leaf().values
  described = json.loads(json.dumps(describe.describe(leaf)))
  del described["data"]["offset"]
  del described["static"]["swapped"]
  back = describe.abstract(described, "w")
  assert back.offset is None and back.swapped == 0
  assert jax.tree.structure(back) == jax.tree.structure(leaf)
  # Only what has a default may be missing, and nothing unknown may stand for it.
  for part, name in (("data", "scale"), ("static", "bits")):
    less = {k: v for k, v in described[part].items() if k != name}
    with pytest.raises(errors.InputError, match=f"{part} fields"):
      describe.abstract(described | {part: less}, "w")
  more = described["data"] | {"offsets": None}
  with pytest.raises(errors.InputError, match="data fields"):
    describe.abstract(described | {"data": more}, "w")


def test_inner_arrays_are_named_by_their_place():
  names = [name for name, _ in describe.arrays("up", _leaf())]
  assert names == ["up.values.codes", "up.values.scale", "up.mask_bits"]
  assert [name for name, _ in describe.arrays("up", jnp.ones(2))] == ["up"]
  assert list(describe.arrays("up", None)) == []


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kind": "mask"}, "did you mean 'masked'"),
    ({"version": 2}, "newer effjax"),
    ({"version": "1"}, "version '1'"),
    ({"static": {"bits": 4}}, "static fields"),
    ({"data": {}}, "data fields"),
    ({"data": None}, "data fields"),
  ],
)
def test_what_does_not_fit_is_refused(change, message):
  described = describe.describe(_leaf()) | change
  with pytest.raises(errors.InputError, match=message) as error:
    describe.abstract(described, "run_0/up")
  assert "run_0/up" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "described",
  [
    3,
    {},
    {"kind": "array"},
    {"kind": "array", "shape": [-1], "dtype": "float32"},
    {"kind": "array", "shape": [1], "dtype": "float33"},
  ],
)
def test_what_describes_nothing_is_refused(described):
  with pytest.raises(errors.InputError, match="run_0/up"):
    describe.abstract(described, "run_0/up")
