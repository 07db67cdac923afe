"""What every registered transform keeps, with its default options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import api as compress
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
  tokens_BL = jax.random.randint(jax.random.key(0), (8, 24), 0, 64)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  return model, params, specs.specs(model), tokens_BL


def _start(change, small):
  """Model, parameters and specs that a transform starts from, with defaults too."""
  model, params, spec_tree, tokens_BL = small
  first = getattr(change, "after", None)
  if first is None:
    return model, params, spec_tree
  batches, before = [{"inputs": tokens_BL}], transforms.find(first)
  made, new = compress.transform(before, model, params, spec_tree, batches)
  return made, new, compress.specs_of(model, made, spec_tree)


@pytest.fixture(scope="module", params=sorted(transforms.names()))
def changed(request, small):
  """A transform, and the model, parameters and specs that it made."""
  change = transforms.find(request.param)
  model, params, spec_tree = _start(change, small)
  batches = [{"inputs": small[3]}]
  made, new = compress.transform(change, model, params, spec_tree, batches)
  return change, made, new, compress.specs_of(model, made, spec_tree)


def test_shapes_and_a_working_model(small, changed):
  model, params, spec_tree, tokens_BL = small
  change, made, new, new_specs = changed
  before, after = tree_lib.flatten(params), tree_lib.flatten(new)
  assert after.keys() == tree_lib.flatten(new_specs).keys()
  assert made is not model or before.keys() == after.keys()
  assert made is not model or any(after[path] is not before[path] for path in before)
  for path, leaf in after.items():
    assert tuple(leaf.shape) == tree_lib.flatten(new_specs)[path].shape
    assert leaf.dtype == jnp.float32
  logits = jax.jit(made.apply)({"params": new}, tokens_BL)[0]
  assert bool(jnp.all(jnp.isfinite(logits)))


def test_a_plan_knows_the_shapes(small, changed):
  change, made, new, _ = changed
  model, params, spec_tree = _start(change, small)
  planned, shapes = compress.shapes(change, model, params, spec_tree)
  if getattr(change, "depends_on_values", False):
    size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    assert size(shapes) >= size(new)
    return
  assert planned == made
  assert jax.tree.structure(shapes) == jax.tree.structure(new)
  for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(new), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_layer_by_layer_equals_stacked(small, changed):
  tokens_BL = small[3]
  _, model, new, _ = changed
  unrolled, flat = layers.unstack(model, new)
  got = jax.jit(unrolled.apply)({"params": flat}, tokens_BL)[0]
  expected = jax.jit(model.apply)({"params": new}, tokens_BL)[0]
  np.testing.assert_allclose(got, expected, atol=1e-4)
  again = layers.restack(unrolled, flat)[1]
  assert jax.tree.structure(again) == jax.tree.structure(new)
  jax.tree.map(np.testing.assert_array_equal, again, new)


def test_bytes_reported_are_bytes_held(changed):
  new = changed[2]
  held = sum(a.nbytes for a in jax.tree.leaves(new))
  assert bytes_lib.held_bytes(new) == held


def test_saved_and_restored_bit_for_bit(changed, tmp_path):
  _, model, new, new_specs = changed
  stages.save_stage(tmp_path / "stage", model, new, new_specs, None)
  loaded = stages.load_stage(tmp_path / "stage")
  assert loaded.model.config == model.config
  assert jax.tree.structure(loaded.params) == jax.tree.structure(new)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, new)
