"""Every preset, and the pairs that make sense, trains like one device.

The fast tests take each preset and each kind of model, the slow ones all of them with
all.
"""

import jax
import numpy as np
import pytest

from effjax.parallel import spread as spread_lib
from tests.parallel import models

# Preset, and the shape of the mesh where it is not the main axis alone.
SHAPES = {
  "dp": {},
  "zero1": {},
  "zero2": {},
  "fsdp": {},
  "hsdp": {"data": 2},
  "tp": {"tensor": 4},
  "ep": {},
  "ring": {},
  "ulysses": {"context": 4},
  "ring+tp": {"tensor": 2},
  "fsdp+ring": {"fsdp": 2, "context": 4},
  "fsdp+ulysses": {"context": 4},
  "ring+ep": {"expert": 2, "context": 4},
  "pp": {"stage": 4},
  "pp+fsdp": {"stage": 4, "fsdp": 2},
  "pp+zero1": {"stage": 2},
  "fsdp+tp": {"tensor": 2},
  "tps": {"tensor": 4},
  "fsdp+tps": {"tensor": 2},
  "hsdp+tp": {"data": 2, "tensor": 2},
  "zero1+tp": {"tensor": 2},
  "zero2+fsdp": {"fsdp": 2},
  "ep+fsdp": {"fsdp": 2},
  "ep+tp": {"expert": 4},
  "dp+ep": {"expert": 2},
}


def over(preset, **fields):
  return spread_lib.over(preset, shape=SHAPES[preset], **fields)


def held(spread, tree):
  """Bytes of a tree on the device that holds most."""
  shards = [s for array in jax.tree.leaves(tree) for s in array.addressable_shards]
  by_device = dict.fromkeys(spread.mesh.devices.flat, 0)
  for shard in shards:
    by_device[shard.device] += shard.data.nbytes
  return max(by_device.values())


def whole(tree):
  return sum(array.nbytes for array in jax.tree.leaves(tree))


# Of parameters and of optimizer state: devices that they are split over.
SPLIT = {
  "dp": (1, 1),
  "zero1": (1, 8),
  "zero2": (1, 8),
  "fsdp": (8, 8),
  "hsdp": (4, 4),
  "zero2+fsdp": (2, 8),
}


@pytest.mark.parametrize("preset", SPLIT)
def test_dense_models_and_what_a_device_holds_of_them(preset):
  spread = over(preset)
  state = models.check(spread, "dense")
  params, moments = SPLIT[preset]
  assert held(spread, state.params) == whole(state.params) / params
  # The chain: gradients, then both moments of Adam and its count, a scalar.
  _, adam = state.opt_state
  for tree in (adam[0].mu, adam[0].nu):
    assert held(spread, tree) == whole(tree) / moments


@pytest.mark.parametrize("preset", ["tp", "tps", "fsdp+tp", "fsdp+tps", "hsdp+tp"])
def test_dense_models_split_in_layers(preset):
  spread = over(preset)
  state = models.check(spread, "dense")
  # Norms and the embedding's vocabulary aside, every matrix is split.
  matrix = state.params["run_0"]["layer_0"]["mlp"]["up"]
  ways = spread.mesh.shape["tensor"] * spread.mesh.shape["fsdp"]
  assert held(spread, matrix) == whole(matrix) / ways


@pytest.mark.parametrize(
  "preset", ["ring", "ulysses", "ring+tp", "fsdp+ring", "fsdp+ulysses"]
)
def test_dense_models_of_split_sequences(preset):
  models.check(over(preset), "dense")


@pytest.mark.parametrize("preset", ["fsdp", "tp", "ring"])
def test_mamba2(preset):
  models.check(over(preset), "mamba2")


@pytest.mark.parametrize("preset", ["hsdp", "ring+tp"])
def test_hybrids(preset):
  models.check(over(preset), "hybrid")


@pytest.mark.parametrize("preset", ["pp", "pp+fsdp", "pp+zero1"])
def test_pipelines(preset):
  spread = over(preset)
  state = models.check(spread, "dense")
  stages, rest = spread.mesh.shape["stage"], spread.mesh.shape["fsdp"]
  layers = state.params["run_0"]
  assert held(spread, layers) == whole(layers) / stages / rest
  _, adam = state.opt_state
  ways = stages * (spread.mesh.shape["data"] if preset == "pp+zero1" else rest)
  moments = adam[0].mu["run_0"]
  assert held(spread, moments) == whole(moments) / ways


@pytest.mark.parametrize(
  ("name", "preset"),
  [("moe", "ep+fsdp"), ("moe", "ep+tp"), ("dropless", "ep"), ("dropless", "ep+tp")],
)
def test_experts(name, preset):
  models.check(over(preset), name)


@pytest.mark.parametrize("preset", ["fsdp", "tp"])
@pytest.mark.parametrize("kind", models.LEAVES)
def test_compressed_leaves(kind, preset):
  models.check(over(preset), "dense", kind)


@pytest.mark.parametrize(
  "kind", ["int8", pytest.param("qlora", marks=pytest.mark.slow)]
)
def test_compressed_experts(kind):
  models.check(over("ep+fsdp"), "moe", kind)


def test_micro_batches_of_split_gradients():
  models.check(over("zero2"), "dense", micro_batches=2)


def test_what_a_batch_cannot_be_divided_into():
  step, _ = models.start(over("dp"), *models.model("dense"))
  with pytest.raises(ValueError, match="make it a multiple of 8"):
    step.put({"inputs": np.zeros((6, 32), np.int32)})


@pytest.mark.slow
@pytest.mark.parametrize("preset", SHAPES)
@pytest.mark.parametrize("name", models.NAMES)
def test_every_preset(name, preset):
  if "ep" in preset.split("+") and name not in models.WITH_EXPERTS:
    pytest.skip("the model has no experts")
  shape = dict(SHAPES[preset])
  if name == "hybrid" and "stage" in shape:  # It repeats its pattern only twice.
    shape["stage"] = 2
  models.check(spread_lib.over(preset, shape=shape), name)


@pytest.mark.slow
@pytest.mark.parametrize(
  "preset", [name for name in SHAPES if "ep" not in name.split("+")]
)
@pytest.mark.parametrize("kind", models.LEAVES)
def test_compressed_leaves_under_every_preset(kind, preset):
  models.check(over(preset), "dense", kind)
