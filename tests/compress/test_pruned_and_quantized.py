"""Pruning and quantization in either order: all leaves of one with all of the other.

What was pruned stays exactly zero, bytes are those of the parts, and products are those
of the dense weight; or one clear line says why not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry
from effjax.core import errors, specs
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs
from effjax.weights.leaves import block_sparse, masked
from tests import selection
from tests.compress.hessian_problems import problem, stats_of

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
IN, OUT = 64, 16
BLOCKS = {"within": "output", "budget": "uniform", "packed": True}
PRUNED = {
  "unstructured": {"sparsity": 0.7},
  "rows": {"pattern": "rows"},
  "columns": {"pattern": "columns"},
  "16x8": {"pattern": "16x8"},
  "2:4": {"pattern": "2:4"},
  "2:4 packed": {"pattern": "2:4", "packed": True},
  "blocks packed": {"pattern": "16x8"} | BLOCKS,
}
PACKED = ("2:4 packed", "blocks packed")
QUANTIZED = {
  "int8": ("rtn", {}),
  "int4": ("rtn", {"bits": 4, "group": 16}),
  "int4 with zero points": ("rtn", {"bits": 4, "group": 16, "symmetric": False}),
  "nf4": ("rtn", {"format": "nf4", "group": 16}),
  "hqq": ("hqq", {"group": 16}),
  "stochastic": ("stochastic", {"bits": 4, "group": 16}),
  "gptq": ("gptq", {"bits": 4, "group": 16}),
}
CASES = [(p, q) for p in PRUNED for q in QUANTIZED if p not in PACKED or q != "gptq"]
EACH_TIME = [
  ("unstructured", "int4 with zero points"),
  ("unstructured", "gptq"),
  ("2:4", "hqq"),
  ("2:4 packed", "nf4"),
  ("blocks packed", "int4"),
  ("16x8", "stochastic"),
]
X = jnp.asarray(np.random.default_rng(1).standard_normal((3, IN)), jnp.float32)


@pytest.fixture(scope="module")
def weight():
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(0, IN, OUT))
  return w, stats_of(h)


def _then(weight, *stages):
  w, stats = weight
  params = {"w": w}
  for name, options in stages:
    params = registry.find(name)(params, {"w": MATRIX}, {"w": stats}, options=options)
  return params["w"]


def _bytes_alone(shape, name, options):
  """Bytes of a plain array of a shape in a format."""
  spec = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", stack=("x",) * 3)
  made = registry.find(name)({"w": jnp.ones(shape)}, {"w": spec}, options=options)
  return made["w"].held_bytes()


def _same_products(leaf):
  dense = verbs.dense(leaf)
  y, expected = verbs.contract(X, leaf), jnp.matmul(X, dense)
  np.testing.assert_allclose(y, expected, atol=1e-4 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("case", selection.quick(CASES, EACH_TIME), ids=" then ".join)
def test_pruned_then_quantized(weight, case):
  pattern, quantizer = case
  before = _then(weight, ("magnitude", PRUNED[pattern]))
  leaf = _then(weight, ("magnitude", PRUNED[pattern]), QUANTIZED[quantizer])
  assert type(leaf) is type(before) and leaf_lib.is_leaf_kind(leaf.values)
  mask = np.asarray(before.mask())
  np.testing.assert_array_equal(leaf.mask(), mask)
  dense = np.asarray(leaf.dense())
  assert np.all(dense[~mask] == 0) and np.mean(dense[mask] != 0) > 0.7
  assert leaf.dtype == jnp.float32 and tuple(leaf.shape) == (IN, OUT)
  name, options = QUANTIZED[quantizer]
  # What GPTQ holds is what RTN does.
  name = "rtn" if name == "gptq" else name
  places = before.held_bytes() - before.values.nbytes
  alone = _bytes_alone(before.values.shape, name, options)
  assert leaf.held_bytes() == places + alone
  _same_products(leaf)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize(
  "quantizer", selection.quick(QUANTIZED, ["int4 with zero points", "nf4"])
)
def test_quantized_then_pruned_and_packed(weight, quantizer, pattern):
  before = _then(weight, QUANTIZED[quantizer])
  stages = QUANTIZED[quantizer], ("magnitude", PRUNED[pattern])
  leaf = _then(weight, *stages)
  assert isinstance(leaf, masked.Masked)
  jax.tree.map(np.testing.assert_array_equal, leaf.values, before)
  mask, dense = np.asarray(leaf.mask()), np.asarray(before.dense())
  np.testing.assert_array_equal(leaf.dense(), np.where(mask, dense, 0))
  # The largest of the rounded weights stay.
  if pattern == "unstructured":
    assert np.abs(dense[mask]).min() >= np.abs(dense[~mask]).max()
  assert leaf.held_bytes() == before.held_bytes() + IN * OUT // 8
  packed = _then(weight, *stages, ("pack", {}))
  np.testing.assert_array_equal(packed.dense(), leaf.dense())
  codes = before.codes.nbytes
  kept = -(-int(mask.sum()) // 8) * 8
  assert packed.held_bytes() == leaf.held_bytes() - codes + codes * kept // (IN * OUT)
  _same_products(packed)


def test_blocks_are_quantized_one_by_one(weight):
  """Each block as if it were a matrix, also of a transposed embedding."""
  w, _ = weight
  before = _then(weight, ("magnitude", PRUNED["blocks packed"]))
  leaf = _then(weight, ("magnitude", PRUNED["blocks packed"]), ("rtn", {"bits": 4}))
  for at in np.ndindex(*before.values.shape[:2]):
    alone = registry.find("rtn")(
      {"w": before.values[at]}, {"w": MATRIX}, options={"bits": 4}
    )["w"]
    np.testing.assert_array_equal(leaf.values.dense()[at], alone.dense())
  table = specs.ParamSpec(axes=("vocab", "embed"), kind="embedding")
  where = {"kind": ("embedding",)}
  turned = {"w": w.T}
  for name, options in (("magnitude", PRUNED["blocks packed"]), ("rtn", {"bits": 4})):
    turned = registry.find(name)(turned, {"w": table}, where=where, options=options)
  assert isinstance(turned["w"], block_sparse.BlockSparse)
  np.testing.assert_array_equal(turned["w"].dense().T, leaf.dense())


@pytest.mark.parametrize("quantizer", ["qat", "lsq"])
def test_fake_quantized_weights_keep_their_zeros(weight, quantizer):
  options = {"bits": 4, "group": 16}
  stages = ("magnitude", PRUNED["unstructured"]), (quantizer, options)
  hard = _then(weight, *stages, ("harden", {}))
  mask = _then(weight, stages[0]).mask()
  assert isinstance(hard, masked.Masked)
  assert np.all(np.asarray(hard.dense())[~np.asarray(mask)] == 0)
  np.testing.assert_array_equal(_then(weight, *stages).dense(), hard.dense())
  packed = _then(weight, *stages, ("harden", {}), ("pack", {}))
  np.testing.assert_array_equal(packed.dense(), hard.dense())


PRUNE = ("magnitude", {})
INT8 = ("rtn", {"activations": "int8"})


@pytest.mark.parametrize(
  ("stages", "message"),
  [
    ((PRUNE, INT8), "w is pruned, which multiplies a dense weight; quantize it with"),
    ((INT8, PRUNE), "w is multiplied with int8 activations, and under a mask would"),
    (
      (("magnitude", PRUNED["2:4 packed"]), QUANTIZED["gptq"]),
      "w: gptq goes through all inputs of a matrix, of which this one holds a part",
    ),
    (
      (("magnitude", PRUNED["blocks packed"]), QUANTIZED["gptq"]),
      "w: gptq goes through all inputs of a matrix, of which this one holds a part",
    ),
    (
      (QUANTIZED["int4"], ("magnitude", PRUNED["2:4 packed"])),
      "w is a quantized leaf, of which nothing can be taken out; prune it packed befo",
    ),
    ((QUANTIZED["int4"], ("sparsegpt", {})), "already a quantized leaf, whose values"),
    ((("sparsegpt", {"quantize": {}}), QUANTIZED["int4"]), "w is already a masked le"),
    ((PRUNE, QUANTIZED["int4"], ("magnitude", {})), "w is already pruned"),
    ((("qat", {}), PRUNE, ("pack", {})), "mask over a fake_quantized leaf; harden it"),
  ],
)
def test_what_cannot_be_says_so(weight, stages, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    _then(weight, *stages)
  assert "\n" not in str(caught.value)
