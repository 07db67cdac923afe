"""N of M: what is held, and what a pruned weight becomes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry
from effjax.core import errors, specs
from effjax.measure import leaves as measure_leaves
from effjax.weights import verbs
from effjax.weights.leaves import masked, n_of_m, quantized

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
EMBEDDING = specs.ParamSpec(axes=("vocab", "embed"), kind="embedding")


def _prune(w, spec=MATRIX, **options):
  where = {"kind": (spec.kind,)}
  return registry.find("magnitude")(
    {"w": w}, {"w": spec}, where=where, options=options
  )["w"]


@pytest.mark.parametrize(("pattern", "bits"), [("2:4", 2), ("1:4", 2), ("4:8", 3)])
@pytest.mark.parametrize("spec", [MATRIX, EMBEDDING], ids=["matrix", "embedding"])
def test_packed_is_the_masked_weight_and_smaller(rng, pattern, bits, spec):
  w = jnp.asarray(rng.standard_normal((16, 32)), jnp.float32)
  packed = _prune(w, spec, pattern=pattern, packed=True)
  held = _prune(w, spec, pattern=pattern)
  assert isinstance(packed, n_of_m.NOfM) and isinstance(held, masked.Masked)
  np.testing.assert_array_equal(packed.dense(), held.dense())
  np.testing.assert_array_equal(packed.mask(), held.mask())
  keep, of = map(int, pattern.split(":"))
  kept = w.size * keep // of
  assert packed.held_bytes() == kept * 4 + kept * bits // 8
  assert measure_leaves.kept_fractions({"w": packed}) == {"w": keep / of}
  assert measure_leaves.simulated({"w": packed}) == ["flops"]


def test_places_rise_within_a_group():
  w = jnp.asarray([[1.0], [0.5], [-3.0], [2.0]])
  leaf = n_of_m.NOfM.create(w, jnp.abs(w) > 1, keep=2, of=4)
  assert leaf.values.ravel().tolist() == [-3.0, 2.0]
  assert leaf.places().ravel().tolist() == [2, 3]
  # Two places of two bits: the lower one in the lower bits.
  assert leaf.place_bits.tolist() == [[2 | 3 << 2]]


def test_what_stays_is_quantized(rng):
  w = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)
  packed = _prune(w, pattern="2:4", packed=True)
  options = {"bits": 4, "group": 16}
  made = registry.find("rtn")({"w": packed}, {"w": MATRIX}, options=options)["w"]
  assert isinstance(made.values, quantized.Quantized)
  np.testing.assert_array_equal(made.mask(), packed.mask())
  by_hand = registry.find("rtn")({"w": packed.values}, {"w": MATRIX}, options=options)
  np.testing.assert_array_equal(made.values.dense(), by_hand["w"].dense())
  # Of 32 weights 16 have 4 bits and a place of 2, and share a scale.
  assert made.held_bytes() == 8 * 32 * (4 + 2) // 8 + 8 * 2 * 4
  x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
  np.testing.assert_allclose(verbs.contract(x, made), x @ made.dense(), atol=1e-4)


def test_values_train_and_places_stay(rng):
  w = jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)
  packed = _prune(w, pattern="2:4", packed=True)
  x = jnp.asarray(rng.standard_normal((5, 8)), jnp.float32)

  def loss(values):
    leaf = n_of_m.NOfM(values, packed.place_bits, keep=2, of=4)
    return jnp.sum(verbs.contract(x, leaf) ** 2)

  gradient = jax.grad(loss)(packed.values)
  dense = jax.grad(lambda w: jnp.sum((x @ w) ** 2))(packed.dense())
  expected = n_of_m.NOfM.create(dense, packed.mask(), keep=2, of=4).values
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_an_embedding_are_looked_up(rng):
  table = jnp.asarray(rng.standard_normal((9, 8)), jnp.float32)
  packed = _prune(table, EMBEDDING, pattern="2:4", packed=True)
  ids = jnp.asarray([[3, 0], [8, 3]])
  np.testing.assert_array_equal(verbs.lookup(packed, ids), packed.dense()[ids])


def test_bad_input(rng):
  w = jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)
  with pytest.raises(errors.InputError, match="groups of 3 do not divide"):
    n_of_m.NOfM.create(w, jnp.ones(w.shape, bool), keep=1, of=3)
  with pytest.raises(errors.InputError, match="mask of shape"):
    n_of_m.NOfM.create(w, jnp.ones((4, 4), bool), keep=2, of=4)
  with pytest.raises(errors.InputError, match="4 of 4: N of M needs 0 < N < M"):
    n_of_m.NOfM.create(w, jnp.ones(w.shape, bool), keep=4, of=4)
  with pytest.raises(errors.InputError, match="packed=True takes a pattern N:M"):
    _prune(w, packed=True)
  coded = registry.find("rtn")({"w": w}, {"w": MATRIX})["w"]
  with pytest.raises(errors.InputError, match="w is a quantized leaf, of which"):
    _prune(coded, pattern="2:4", packed=True)
  packed = _prune(w, pattern="2:4", packed=True)
  with pytest.raises(errors.InputError, match="w is already pruned"):
    _prune(packed)
  with pytest.raises(errors.InputError, match="w: gptq goes through all inputs"):
    registry.find("gptq")({"w": packed}, {"w": MATRIX}, {})
