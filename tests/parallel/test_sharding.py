"""Shardings of trees: tables, heads, packed leaves, optimizer state, refusals."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from effjax.core import errors, specs
from effjax.parallel import sharding
from effjax.parallel import spread as spread_lib
from effjax.weights.leaves import quantized

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", shape=(64, 128))


def _one(preset, spec, leaf, **fields):
  return spread_lib.over(preset, **fields).params({"w": spec}, {"w": leaf})["w"]


@pytest.mark.parametrize(
  ("preset", "shape", "expected"),
  [
    ("dp", {}, P()),
    ("zero1", {}, P()),
    ("fsdp", {}, P("fsdp")),
    ("hsdp", {"data": 2}, P("fsdp")),
    ("tp", {}, P(None, "tensor")),
    ("fsdp+tp", {"tensor": 2}, P("fsdp", "tensor")),
    ("tp+fsdp", {"fsdp": 2}, P("fsdp", "tensor")),
    ("ring", {}, P()),
  ],
)
def test_presets_are_tables(preset, shape, expected):
  assert _one(preset, MATRIX, jnp.zeros((64, 128)), shape=shape).spec == expected


def test_experts_and_layers_have_axes_of_their_own():
  spec = specs.ParamSpec(
    axes=("experts", "embed", "mlp"), kind="matrix", stack=("layers",)
  )
  shape = jax.ShapeDtypeStruct((4, 8, 64, 128), jnp.float32)
  placed = _one("pp+ep+tp", spec, shape, shape={"expert": 2, "tensor": 2})
  assert placed.spec == P("stage", "expert", None, "tensor")
  placed = _one("ep+fsdp", spec, shape, shape={"fsdp": 2})
  assert placed.spec == P(None, "expert", "fsdp")


@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero1+tp"])
def test_zero_splits_what_parameters_do_not(preset):
  shape = {"tensor": 2} if "tp" in preset else {}
  spread = spread_lib.over(preset, shape=shape)
  tree, spec_tree = {"w": jnp.zeros((64, 128))}, {"w": MATRIX}
  own = (None, "tensor") if "tp" in preset else ()
  assert spread.params(spec_tree, tree)["w"].spec == P(*own)
  split = P("data", *own[1:])
  assert spread.state(spec_tree, tree)["w"].spec == split
  reduced = split if preset == "zero2" else P(*own)
  assert spread.gradients(spec_tree, tree)["w"].spec == reduced


def test_heads_are_not_cut():
  spec = specs.ParamSpec(axes=("embed", "kv"), kind="matrix", head_dim=16)
  shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)  # 4 heads, 8 devices
  assert _one("tp", spec, shape).spec == P()
  whole = specs.ParamSpec(axes=("embed", "kv"), kind="matrix", head_dim=8)
  assert _one("tp", whole, shape).spec == P(None, "tensor")


def test_a_dimension_that_does_not_divide_leaves_the_axis_to_the_next():
  spec = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
  shape = jax.ShapeDtypeStruct((63, 128), jnp.float32)
  assert _one("fsdp", spec, shape).spec == P(None, "fsdp")


def test_quantized_leaf_inherits_axes_and_refuses_a_cut_group():
  w = quantized.Quantized.create(
    jnp.zeros((64, 128), jnp.int32), jnp.ones((8, 128)), bits=4
  )
  placed = _one("fsdp", MATRIX, w)
  assert placed.codes.spec == P("fsdp") and placed.scale.spec == P("fsdp")
  # 512 x 2^18 codes in four groups: eight devices would cut them, and scales are large.
  big = jax.eval_shape(
    lambda: quantized.Quantized.create(
      jnp.zeros((512, 2**18), jnp.int32), jnp.ones((4, 2**18)), bits=4
    )
  )
  spec = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
  with pytest.raises(errors.InputError, match=r"w\.scale: its axis 0 has 4 groups"):
    _one("fsdp", spec, big)


def test_optimizer_state_is_sharded_like_its_parameters():
  spread = spread_lib.over("fsdp")
  params = {"w": jnp.zeros((64, 128)), "hole": None}
  spec_tree = {"w": MATRIX, "hole": MATRIX}
  for tx in (optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=32)):
    state = jax.eval_shape(tx.init, params)
    placed = spread.state(spec_tree, state)
    by_shape = {
      leaf.shape: s.spec
      for leaf, s in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    }
    for shape, spec in by_shape.items():
      expected = {(64, 128): P("fsdp"), (64,): P("fsdp"), (128,): P("fsdp")}
      assert spec == expected.get(shape, P()), (shape, spec)


def _check(preset, spec, leaf, table="params", **fields):
  spread = spread_lib.over(preset, **fields)
  tree, spec_tree = {"w": leaf}, {"w": spec}
  placed = getattr(spread, table)(spec_tree, tree)
  spread.check(getattr(spread.preset, table), spec_tree, tree, placed)


def test_large_replicated_arrays_are_refused():
  odd = jax.ShapeDtypeStruct((1001, 1003), jnp.float32)
  spec = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", shape=odd.shape)
  message = (
    r"^w \(4016012 bytes\) would be whole on each of the 8 devices along 'fsdp', which "
    r"preset 'fsdp' splits it over: its 1001 'embed' do not divide by 8 \(1000 or 1008 "
    r"do\); its 1003 'mlp' do not divide by 8 \(1000 or 1008 do\), or name it in "
  )
  with pytest.raises(errors.InputError, match=message):
    _check("fsdp", spec, odd)
  with pytest.raises(errors.InputError, match="1003 'mlp'"):
    _check("tp", spec, odd)
  with pytest.raises(errors.InputError, match="along 'data'"):
    _check("zero1", spec, odd, "state")
  _check("zero1", spec, odd)
  _check("dp", spec, odd)
  _check("fsdp", spec, odd, replicate="^w$")


def test_key_heads_that_do_not_divide_are_replicated_and_reported():
  spread = spread_lib.over("tp")
  shape = jax.ShapeDtypeStruct((4096, 4 * 128), jnp.float32)
  spec = specs.ParamSpec(
    axes=("embed", "kv"), kind="matrix", head_dim=128, shape=shape.shape
  )
  _check("tp", spec, shape)
  placed = spread.params({"k": spec}, {"k": shape})
  assert sharding.replicated_keys(spread.mesh, {"k": spec}, placed) == ["k"]
  queries = specs.ParamSpec(
    axes=("embed", "heads"), kind="matrix", head_dim=128, shape=shape.shape
  )
  with pytest.raises(errors.InputError, match=r"its 4 'heads' do not divide by 8 \(8"):
    _check("tp", queries, shape)


def test_matrices_count_however_small_where_devices_split_the_work():
  small = jax.ShapeDtypeStruct((64, 12), jnp.float32)
  spec = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", shape=small.shape)
  with pytest.raises(
    errors.InputError, match=r"its 12 'mlp' do not divide by 8 \(8 or"
  ):
    _check("tp", spec, small)
  _check("fsdp", spec, small)
  words = specs.ParamSpec(axes=("embed", "vocab"), kind="matrix", shape=small.shape)
  _check("tp", words, small)


def test_a_preset_that_splits_nothing_of_a_model_is_refused():
  spread = spread_lib.over("ep+fsdp", shape={"fsdp": 2})
  with pytest.raises(errors.InputError, match="over the 4 devices along 'expert', and"):
    spread.check_used({"w": MATRIX})
  experts = specs.ParamSpec(axes=("experts", "embed", "mlp"), kind="matrix")
  spread.check_used({"w": experts})
