"""A tree splits into trained and frozen arrays and comes back whole."""

import jax
import jax.numpy as jnp
import pytest

from effjax.core import partition
from effjax.weights.leaves import masked, quantized


def _tree():
  codes = jnp.ones((4, 2), jnp.int8)
  return {
    "a": {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)},
    "q": quantized.Quantized.create(codes, jnp.ones((1, 2)), bits=8),
    "m": masked.Masked.create(jnp.ones((4, 2)), jnp.eye(4, 2, dtype=bool)),
  }


def test_round_trip_and_holes():
  tree = _tree()
  trainable, frozen = partition.partition(tree, {"a/w", "q", "m"})
  assert trainable["a"]["b"] is None and frozen["a"]["w"] is None
  assert trainable["q"] is None  # integer codes never train
  assert trainable["m"].mask_bits is None and frozen["m"].values is None
  merged = partition.merge(trainable, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(tree)
  for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tree), strict=True):
    assert a is b


def test_gradients_flow_only_to_the_trainable_part():
  trainable, frozen = partition.partition(_tree(), {"a/w", "m"})

  def loss(trainable):
    tree = partition.merge(trainable, frozen)
    return jnp.sum(tree["a"]["w"] ** 2) + jnp.sum(tree["m"].dense() * 3)

  grads = jax.grad(loss)(trainable)
  assert jnp.all(grads["a"]["w"] == 2)
  assert jnp.all(grads["m"].values == 3 * jnp.eye(4, 2))
  assert grads["q"] is None


def test_merge_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match="both parts"):
    partition.merge({"a": jnp.ones(1)}, {"a": jnp.ones(1)})
  with pytest.raises(ValueError, match="neither"):
    partition.merge({"a": None}, {"a": None})
