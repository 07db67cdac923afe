"""Packing: what masks drop is gone, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry
from effjax.core import errors, specs
from effjax.interop import assemble
from effjax.measure import leaves as measure_leaves
from effjax.weights import verbs
from effjax.weights.leaves import compressed, masked
from tests.compress.prune.conftest import SPECS

ALL = {"kind": ("matrix", "embedding")}
STACKED = specs.ParamSpec(
  axes=("embed", "mlp"), kind="matrix", stack=("layers", "experts")
)


def _then(params, about, *stages):
  """Parameters after transforms `(name, options)`, of everything."""
  for name, options in stages:
    params = registry.find(name)(params, about, where=ALL, options=options)
  return params


@pytest.mark.parametrize(
  "stages",
  [
    [("magnitude", {"sparsity": 0.8})],
    [("magnitude", {"sparsity": 0.8}), ("rtn", {"bits": 8})],
    [("rtn", {"bits": 4}), ("magnitude", {"sparsity": 0.5})],
    [("rtn", {"format": "nf4", "group": 8}), ("magnitude", {"pattern": "2:4"})],
  ],
  ids=["float", "int8 of what stays", "pruned int4", "2:4 of nf4"],
)
def test_the_function_is_the_same_and_bytes_are_fewer(params, stages):
  before = _then(params, SPECS, *stages)
  packed = _then(before, SPECS, ("pack", {}))
  for name, leaf in packed.items():
    assert isinstance(leaf, compressed.Compressed)
    np.testing.assert_array_equal(leaf.dense(), before[name].dense())
    assert leaf.held_bytes() < before[name].held_bytes()
  assert measure_leaves.simulated(packed) == ["flops"]
  fractions = measure_leaves.kept_fractions(packed)
  assert fractions == measure_leaves.kept_fractions(before)
  x = jnp.ones((3, 16))
  contract = jax.jit(verbs.contract)
  np.testing.assert_array_equal(
    contract(x, packed["a"]), contract(x, before["a"].dense())
  )
  ids = jnp.asarray([4, 0])
  np.testing.assert_array_equal(
    verbs.lookup(packed["c"], ids), before["c"].dense()[ids]
  )


def test_stacked_matrices_hold_as_much_as_the_fullest(rng):
  w = jnp.asarray(rng.standard_normal((2, 3, 16, 8)), jnp.float32)
  w *= jnp.arange(1.0, 7).reshape(2, 3, 1, 1)  # One threshold keeps more of the last.
  made = _then({"w": w}, {"w": STACKED}, ("magnitude", {}), ("pack", {}))["w"]
  counts = np.asarray(made.mask()).sum(axis=(-1, -2))
  assert counts.min() < counts.max() == counts[1, 2]
  assert made.values.shape == (2, 3, -(-counts.max() // 8) * 8)
  alone = compressed.Compressed.create(made.dense()[0, 0], made.mask()[0, 0])
  assert alone.values.size < made.values[0, 0].size


@pytest.mark.parametrize("layout", ["bitmap", "csr"])
def test_a_layout_can_be_asked_for(params, layout):
  made = _then(params, SPECS, ("magnitude", {}), ("pack", {"layout": layout}))
  assert {leaf.layout for leaf in made.values()} == {layout}


def test_what_it_does_not_take(params):
  with pytest.raises(errors.InputError, match="pack found no masked weight among"):
    _then(params, SPECS, ("pack", {}))
  with pytest.raises(errors.InputError, match="unknown layout 'coo'"):
    _then(params, SPECS, ("magnitude", {}), ("pack", {"layout": "coo"}))
  thin = registry.find("svd")(params, SPECS, options={"rank": 2})
  with pytest.raises(errors.InputError, match="a is a mask over a low_rank leaf"):
    _then(thin, SPECS, ("magnitude", {}), ("pack", {}))
  packed = _then(params, SPECS, ("magnitude", {}), ("pack", {}))
  with pytest.raises(errors.InputError, match="a is already pruned; start after"):
    _then(packed, SPECS, ("magnitude", {}))
  with pytest.raises(errors.InputError, match="a is packed, .* quantize it before"):
    _then(packed, SPECS, ("rtn", {}))


def test_other_leaves_stay(params):
  pruned = _then(params, SPECS, ("magnitude", {}))
  mixed = {"a": pruned["a"], "b": params["b"], "c": pruned["c"]}
  made = registry.find("pack")(mixed, SPECS, where={"path": "a|b"})
  assert isinstance(made["a"], compressed.Compressed)
  assert made["b"] is params["b"] and isinstance(made["c"], masked.Masked)


def test_plain_formats_take_the_zeros_as_values(params):
  pruned = _then(params, SPECS, ("magnitude", {}))
  packed = _then(pruned, SPECS, ("pack", {}))
  plain = assemble.require_plain(packed, "a file")
  for name, w in plain.items():
    np.testing.assert_array_equal(w, pruned[name].dense())
  coded = _then(params, SPECS, ("magnitude", {}), ("rtn", {}), ("pack", {}))
  with pytest.raises(errors.InputError, match="a is compressed, which a file cannot"):
    assemble.require_plain(coded, "a file")
