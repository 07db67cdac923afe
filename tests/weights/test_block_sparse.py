"""Block-sparse weights: what is held, what is multiplied, and how they are made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry
from effjax.core import errors, specs
from effjax.measure import leaves as measure_leaves
from effjax.ops import flops
from effjax.weights import verbs
from effjax.weights.leaves import block_sparse

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
EMBEDDING = specs.ParamSpec(axes=("vocab", "embed"), kind="embedding")


def _prune(params, spec=MATRIX, stats=None, name="magnitude", **options):
  options = {"within": "output", "budget": "uniform", "packed": True} | options
  return registry.find(name)(
    params,
    dict.fromkeys(params, spec),
    stats,
    where={"kind": (spec.kind,)},
    options=options,
  )


@pytest.mark.parametrize("spec", [MATRIX, EMBEDDING], ids=["matrix", "embedding"])
def test_packed_is_the_masked_weight_and_smaller(rng, spec):
  w = jnp.asarray(rng.standard_normal((2, 16, 32)), jnp.float32)
  packed = _prune({"w": w}, spec, pattern="4x2", sparsity=0.75)["w"]
  held = _prune({"w": w}, spec, pattern="4x2", sparsity=0.75, packed=False)["w"]
  assert isinstance(packed, block_sparse.BlockSparse)
  np.testing.assert_array_equal(packed.dense(), held.dense())
  np.testing.assert_array_equal(packed.mask(), held.mask())
  blocks = w.size // 4 // 8
  assert packed.held_bytes() == blocks * (8 * 4 + 4)
  # Its products execute only what stays, of which nothing more could be skipped.
  assert measure_leaves.kept_fractions({"w": packed, "held": held}) == {
    "w": 1.0,
    "held": 0.25,
  }
  assert measure_leaves.simulated({"w": packed}) == []


def test_the_heaviest_blocks_of_each_column_stay(rng):
  w = rng.standard_normal((12, 6)).astype(np.float32)
  packed = _prune({"w": jnp.asarray(w)}, pattern="3x2", sparsity=0.5)["w"]
  means = np.abs(w).reshape(4, 3, 3, 2).mean(axis=(1, 3))
  expected = np.argsort(means, axis=0)[2:].T
  np.testing.assert_array_equal(packed.rows, np.sort(expected, axis=1))


def test_a_product_costs_what_the_density_says(rng):
  w = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
  packed = _prune({"w": w}, pattern="8x8", sparsity=0.75)["w"]
  x = jnp.asarray(rng.standard_normal((5, 3, 64)), jnp.float32)
  contract = lambda x, w: verbs.contract(x, w)
  dense = flops.dot_flops(contract, x, packed.dense())
  assert flops.dot_flops(contract, x, packed) * 4 == dense
  np.testing.assert_allclose(
    contract(x, packed), contract(x, packed.dense()), atol=1e-5
  )


def test_uneven_columns_are_filled_up(rng):
  w = jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)
  kept = np.array([[1, 1], [0, 1], [0, 1], [0, 0]], bool)
  mask = jnp.asarray(np.kron(kept, np.ones((2, 2), bool)))
  leaf = block_sparse.BlockSparse.create(w, mask, (2, 2))
  assert leaf.values.shape == (2, 3, 2, 2)
  np.testing.assert_array_equal(leaf.dense(), np.where(mask, w, 0))
  x = jnp.asarray(rng.standard_normal((3, 8)), jnp.float32)
  expected = np.asarray(x) @ np.where(mask, w, 0)
  np.testing.assert_allclose(verbs.contract(x, leaf), expected, atol=1e-5)
  empty = block_sparse.BlockSparse.create(w, jnp.zeros(w.shape, bool), (2, 2))
  assert not np.asarray(empty.dense()).any()


def test_erk_gives_each_matrix_its_own_count(rng):
  make = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  params = {"a": make(64, 64), "b": make(32, 8)}
  options = {"pattern": "4x4", "sparsity": 0.6, "budget": "erk"}
  out = _prune(params, **options)
  shapes = jax.eval_shape(lambda p: _prune(p, **options), params)  # what a plan does
  for name in "ab":
    assert shapes[name].values.shape == out[name].values.shape
  density = lambda w: w.values.size / np.prod(w.shape)
  assert density(out["b"]) > density(out["a"])


def test_gradients_reach_the_blocks_that_are_there(rng):
  w = jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)
  packed = _prune({"w": w}, pattern="2x2", sparsity=0.5)["w"]
  x = jnp.asarray(rng.standard_normal((5, 8)), jnp.float32)
  loss = lambda leaf: jnp.sum(verbs.contract(x, leaf) ** 2)
  found = jax.grad(loss, allow_int=True)(packed)
  dense = jax.grad(lambda w: jnp.sum((x @ w) ** 2))(packed.dense())
  expected = block_sparse.BlockSparse.create(dense, packed.mask(), (2, 2))
  np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"pattern": "4x4", "within": "matrix"}, "packed=True takes a pattern N:M, or BxC"),
    ({"pattern": "4x4", "budget": "owl"}, "packed=True takes a pattern N:M, or BxC"),
    ({"pattern": "rows", "within": "matrix"}, "packed=True takes a pattern N:M"),
    ({"pattern": "5x4"}, "w: blocks of 5x4 .* do not divide a matrix of 16x8"),
  ],
)
def test_bad_input(rng, options, message):
  w = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
  with pytest.raises(errors.InputError, match=message):
    _prune({"w": w}, **options)
