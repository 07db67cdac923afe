import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from effjax.core import layers
from effjax.core import tree as tree_lib
from effjax.measure import flops as model_flops
from effjax.ops import flops
from effjax.weights import verbs
from effjax.weights.leaves import masked, quantized

_spec = importlib.util.spec_from_file_location(
  "hlo", pathlib.Path(__file__).with_name("hlo.py")
)
hlo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hlo)


def _hlo_flops(fn, *args):
  lowered = jax.jit(fn).lower(*args)
  return hlo.dot_flops(lowered.compiler_ir("hlo").as_hlo_text())


def test_product_equals_closed_form_and_the_compiler():
  a, b = jnp.ones((3, 5, 7)), jnp.ones((3, 7, 11))
  fn = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)
  assert flops.dot_flops(fn, a, b) == 2 * 3 * 5 * 7 * 11
  assert _hlo_flops(fn, a, b) == 2 * 3 * 5 * 7 * 11
  analysis = jax.jit(fn).lower(a, b).compile().cost_analysis()
  assert analysis["flops"] == 2 * 3 * 5 * 7 * 11


def test_convolution_equals_the_compiler():
  x, w = jnp.ones((2, 16, 6)), jnp.ones((3, 2, 9))
  fn = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1,),
    padding="VALID",
    dimension_numbers=("NWC", "WIO", "NWC"),
    feature_group_count=3,
  )
  assert flops.dot_flops(fn, x, w) == 2 * (2 * 14 * 9) * (3 * 2)
  assert flops.dot_flops(fn, x, w) == jax.jit(fn).lower(x, w).cost_analysis()["flops"]


def test_unrolled_model_equals_the_hlo(model, params):
  unrolled, flat = layers.unstack(model, params)
  tokens_BL = jnp.zeros((1, 24), jnp.int32)
  fn = lambda p, t: unrolled.apply({"params": p}, t)[0]
  counted = flops.dot_flops(fn, flat, tokens_BL)
  assert counted == _hlo_flops(fn, flat, tokens_BL) > 0
  # The compiler's own count has the elementwise work on top.
  total = jax.jit(fn).lower(flat, tokens_BL).cost_analysis()["flops"]
  assert counted < total


def test_gradient_of_unrolled_model_equals_the_hlo(model, params):
  unrolled, flat = layers.unstack(model, params)
  tokens_BL = jnp.zeros((1, 24), jnp.int32)
  fn = jax.grad(lambda p, t: unrolled.apply({"params": p}, t)[0].sum())
  assert flops.dot_flops(fn, flat, tokens_BL) == _hlo_flops(fn, flat, tokens_BL)


def test_scanned_model_equals_unrolled(model, params):
  scanned = model_flops.per_token(model, params, 24)
  unrolled = model_flops.per_token(*layers.unstack(model, params), 24)
  assert scanned == unrolled
  assert scanned.executed == scanned.theoretical


def test_every_matrix_is_credited_with_its_products(model, params, specs):
  length = 24
  shapes = tree_lib.flatten(params)
  found = flops.per_parameter(
    lambda flat, t: model.apply({"params": tree_lib.unflatten(flat)}, t)[0],
    shapes,
    jax.ShapeDtypeStruct((1, length), jnp.int32),
  )
  for path, spec in tree_lib.flatten(specs).items():
    if spec.kind in ("matrix", "embedding"):
      assert found[path] == 2 * spec.size * length, path
  assert found[""] > 0


def _masked(array, keep, seed=0):
  mask = np.random.default_rng(seed).permutation(array.size) < keep
  return masked.Masked.create(array, jnp.asarray(mask.reshape(array.shape)))


def test_pruned_weights_save_in_theory_only(model, params):
  flat = dict(tree_lib.flatten(params))
  dense = model_flops.per_token(model, params, 24)
  path = next(p for p in flat if p.endswith("mlp/up"))
  size = flat[path].size
  flat[path] = _masked(flat[path], size // 4)
  pruned = model_flops.per_token(model, tree_lib.unflatten(flat), 24)
  assert pruned.executed == dense.executed
  saved = dense.theoretical - pruned.theoretical
  assert saved == pytest.approx(2 * size * 3 / 4, rel=1e-12)


def test_quantized_values_under_a_mask_are_still_one_parameter():
  codes = jnp.ones((8, 6), jnp.int8)
  scale = jnp.ones((2, 6))
  mask = jnp.arange(48).reshape(8, 6) < 12
  values = quantized.Quantized.create(codes, scale, bits=4)
  leaf = masked.Masked.create(values, mask)
  x = jax.ShapeDtypeStruct((3, 8), jnp.float32)
  fn = lambda flat, x: verbs.contract(x, flat["w"])
  assert flops.per_parameter(fn, {"w": leaf}, x) == {"w": 2 * 3 * 8 * 6, "": 0}


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_integer_product_counts_like_a_float_one(activations):
  leaf = quantized.Quantized.create(
    jnp.ones((8, 6), jnp.int8), jnp.ones((1, 6)), bits=8, activations=activations
  )
  x = jax.ShapeDtypeStruct((3, 8), jnp.float32)
  fn = lambda flat, x: verbs.contract(x, flat["w"])
  assert flops.per_parameter(fn, {"w": leaf}, x) == {"w": 2 * 3 * 8 * 6, "": 0}


def test_loops_branches_and_wrapped_functions():
  w = jnp.ones((4, 4))
  one = 2 * 4**3
  body = lambda c, _: (c @ w, None)
  nested = lambda x: jax.lax.scan(lambda c, _: body(body(c, 0)[0], 0), x, length=7)
  assert flops.dot_flops(nested, w) == 14 * one
  assert flops.dot_flops(jax.jit(jax.checkpoint(lambda x: x @ w)), w) == one
  branch = lambda i, x: jax.lax.cond(i, lambda x: x @ w @ w, lambda x: x @ w, x)
  assert flops.dot_flops(branch, True, w) == 2 * one
  counted = lambda x: jax.lax.while_loop(
    lambda c: c[0] < 10, lambda c: (c[0] + 3, c[1] @ w), (0, x)
  )
  assert flops.dot_flops(counted, w) == 4 * one
  assert flops.dot_flops(
    lambda x: jax.lax.fori_loop(2, 7, lambda _, c: c @ w, x), w
  ) == (5 * one)


def test_unknown_trip_count_is_an_error_only_with_products():
  loop = lambda x, n, f: jax.lax.fori_loop(0, n, lambda _, c: f(c), x)
  w = jnp.ones((4, 4))
  assert flops.dot_flops(lambda x, n: loop(x, n, lambda c: c + 1), w, 3) == 0
  with pytest.raises(ValueError, match="unknown number of times"):
    flops.dot_flops(lambda x, n: loop(x, n, lambda c: c @ c), w, 3)


def test_ragged_product_counts_each_row_once():
  x, w, sizes = jnp.ones((10, 4)), jnp.ones((3, 4, 6)), jnp.array([2, 3, 5])
  assert flops.dot_flops(jax.lax.ragged_dot, x, w, sizes) == 2 * 10 * 4 * 6


def test_shard_map_counts_all_devices():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  fn = jax.shard_map(
    lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
  )
  assert flops.dot_flops(fn, jnp.ones((8, 4)), jnp.ones((4, 6))) == 2 * 8 * 4 * 6
