import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.optim import base
from effjax.optim import config as optim_config
from effjax.weights.formats import base as format_base
from effjax.weights.leaves import fake_quantized


def test_decay_mask_goes_by_kind(toy):
  params = toy.random_like(toy.specs, 0)
  mask = base.decay_mask(toy.specs)(params)
  layer = mask["run_0"]["layer_0"]
  decayed = {name for name, decays in layer.items() if decays}
  assert decayed == {"conv", "o", "q"}
  assert mask["embed"]["table"]
  without = base.decay_mask(toy.specs, decay_embedding=False)(params)
  assert not without["embed"]["table"]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lamb", "lion", "muon", "sgd"])
def test_steps_do_not_decay_and_are_no_matrices(toy, name):
  specs = {"w": toy.make_spec("matrix", ("embed", "mlp"), (8, 4))}
  leaf = fake_quantized.FakeQuantized.create(
    jnp.ones((8, 4)), format_base.FormatOptions(bits=4), jnp.full((1, 4), 0.5)
  )
  rate, no_gradient = 0.1, jax.tree.map(jnp.zeros_like, {"w": leaf})
  config = optim_config.OptimizerConfig(
    name=name, learning_rate=rate, schedule="constant", options={"weight_decay": 0.5}
  )
  tx, _ = optim_config.build(config, specs, 5)
  params = {"w": leaf}
  updates, _ = tx.update(no_gradient, tx.init(params), params)
  assert float(jnp.max(updates["w"].values)) < 0
  np.testing.assert_array_equal(updates["w"].scale, 0)
  if name != "muon":
    return
  # Adam's first updates have one size; those of an orthogonalised row would not.
  some = {"w": dataclasses.replace(leaf, scale=jnp.asarray([[1e-2, -1e-3, 1e-2, 0]]))}
  updates, _ = tx.update(some, tx.init(params), params)
  found = updates["w"].scale
  np.testing.assert_allclose(found, [[-rate, rate, -rate, 0]], rtol=1e-4, atol=0)


def test_holes_stay_and_a_leaf_of_several_arrays_shares_its_spec(toy):
  specs = {
    name: toy.make_spec("matrix", ("a", "b"), (2, 2)) for name in ("p", "q", "r", "s")
  }
  tree = {
    "p": None,
    "q": optax.MaskedNode(),
    "r": (jnp.ones((2, 1)), None),
    "s": jnp.ones((2, 2)),
  }
  rest = {"p": None, "q": optax.MaskedNode(), "r": (None, None), "s": jnp.ones(())}
  seen = []

  def fn(spec, array, other):
    seen.append((spec.kind, array.shape, other is None))
    return array.size

  mapped = base.map_with_specs(fn, specs, tree, rest)
  assert mapped == {"p": None, "q": optax.MaskedNode(), "r": (2, None), "s": 4}
  assert seen == [("matrix", (2, 1), True), ("matrix", (2, 2), False)]


def test_blocks_are_single_matrices_even_of_experts(toy):
  experts = toy.make_spec("matrix", ("experts", "embed", "mlp"), (4, 5, 6, 7))
  norm = toy.make_spec("norm", ("embed",), (4, 6))
  assert base.block_axes(experts, 4) == (2, 3)
  assert base.block_axes(norm, 2) == (1,)
