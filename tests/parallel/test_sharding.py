"""Shardings follow the tables; heads and quantization groups are never cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from effjax.core import errors, specs
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules, sharding
from effjax.weights.leaves import quantized

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", shape=(64, 128))


def _mesh(preset, **kwargs):
  return mesh_lib.make(mesh_lib.MeshConfig(preset=preset, **kwargs))


def _one(preset, spec, leaf):
  table = rules.PRESETS[preset].params
  return sharding.tree_shardings(_mesh(preset), table, {"w": spec}, {"w": leaf})["w"]


@pytest.mark.parametrize(
  ("preset", "expected"), [("dp", P()), ("fsdp", P("fsdp")), ("tp", P(None, "tensor"))]
)
def test_presets_are_tables(preset, expected):
  assert _one(preset, MATRIX, jnp.zeros((64, 128))).spec == expected


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
  mesh, table = _mesh("fsdp"), rules.PRESETS["fsdp"].params
  params = {"w": jnp.zeros((64, 128)), "hole": None}
  spec_tree = {"w": MATRIX, "hole": MATRIX}
  for tx in (optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=32)):
    state = jax.eval_shape(tx.init, params)
    placed = sharding.state_shardings(mesh, table, spec_tree, state)
    by_shape = {
      leaf.shape: s.spec
      for leaf, s in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    }
    for shape, spec in by_shape.items():
      expected = {(64, 128): P("fsdp"), (64,): P("fsdp"), (128,): P("fsdp")}
      assert spec == expected.get(shape, P()), (shape, spec)


def test_large_replicated_arrays_are_reported():
  mesh = _mesh("fsdp")
  odd = {"w": jax.ShapeDtypeStruct((1001, 1003), jnp.float32)}
  spec_tree = {"w": specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")}
  placed = sharding.tree_shardings(mesh, rules.PRESETS["fsdp"].params, spec_tree, odd)
  with pytest.raises(errors.InputError, match="would replicate large arrays"):
    sharding.check_not_replicated(mesh, "fsdp", odd, placed)
  sharding.check_not_replicated(mesh, "dp", odd, placed)


def test_mesh_mistakes():
  with pytest.raises(errors.InputError, match="did you mean 'fsdp'"):
    mesh_lib.MeshConfig(preset="fdsp")
  with pytest.raises(errors.InputError, match="needs 16 devices"):
    mesh_lib.make(mesh_lib.MeshConfig(shape=(16, 1, 1)))
  assert _mesh("dp", num_devices=4).shape == {"data": 4, "fsdp": 1, "tensor": 1}
  assert _mesh("dp", shape=(2, 2, 2)).devices.shape == (2, 2, 2)
  assert np.prod(_mesh("tp").devices.shape) == 8
