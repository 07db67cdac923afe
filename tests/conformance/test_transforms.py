"""What every registered transform keeps, with its default options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import calibrate
from effjax.compress import registry as transforms
from effjax.core import layers, specs
from effjax.core import tree as tree_lib
from effjax.measure import bytes as bytes_lib
from effjax.models import decoder
from effjax.train import stages
from tests.models.conftest import small_config


@pytest.fixture(scope="module")
def small():
  # The second layer has experts: stacked leaves that every transform handles.
  config = small_config(
    num_layers=2,
    mlp_pattern=("swiglu", "moe"),
    mlp_options={"moe": {"num_experts": 3, "hidden_dim": 32, "router": "sigmoid"}},
  )
  model = decoder.Decoder(config)
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 8), 0, 64)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  return model, params, specs.specs(model), tokens_BL


@pytest.fixture(scope="module", params=sorted(transforms.names()))
def changed(request, small):
  model, params, spec_tree, tokens_BL = small
  technique = transforms.find(request.param)
  stats = None
  if technique.needs_stats:
    batches = [{"inputs": tokens_BL}]
    stats = calibrate.calibrate(model, params, batches, collect=technique.collect)
  return technique(params, spec_tree, stats)


def test_same_paths_shapes_and_a_working_model(small, changed):
  model, params, spec_tree, tokens_BL = small
  before, after = tree_lib.flatten(params), tree_lib.flatten(changed)
  assert before.keys() == after.keys()
  assert any(after[path] is not before[path] for path in before)
  for path, leaf in after.items():
    assert tuple(leaf.shape) == tree_lib.flatten(spec_tree)[path].shape
    assert leaf.dtype == before[path].dtype
  logits = jax.jit(model.apply)({"params": changed}, tokens_BL)[0]
  assert bool(jnp.all(jnp.isfinite(logits)))


def test_layer_by_layer_equals_stacked(small, changed):
  model, _, _, tokens_BL = small
  unrolled, flat = layers.unstack(model, changed)
  got = jax.jit(unrolled.apply)({"params": flat}, tokens_BL)[0]
  expected = jax.jit(model.apply)({"params": changed}, tokens_BL)[0]
  np.testing.assert_allclose(got, expected, atol=1e-4)
  again = layers.restack(unrolled, flat)[1]
  assert jax.tree.structure(again) == jax.tree.structure(changed)
  jax.tree.map(np.testing.assert_array_equal, again, changed)


def test_bytes_reported_are_bytes_held(changed):
  held = sum(a.nbytes for a in jax.tree.leaves(changed))
  assert bytes_lib.held_bytes(changed) == held


def test_saved_and_restored_bit_for_bit(small, changed, tmp_path):
  model, _, spec_tree, _ = small
  stages.save_stage(tmp_path / "stage", model, changed, spec_tree, None)
  loaded = stages.load_stage(tmp_path / "stage")
  assert loaded.model.config == model.config
  assert jax.tree.structure(loaded.params) == jax.tree.structure(changed)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, changed)
