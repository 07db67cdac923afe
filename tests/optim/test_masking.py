import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.optim import masking


def test_alone_it_masks_updates():
  tx = masking.keep_masks({"a": np.array([True, False]), "b": None})
  params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  updates, _ = tx.update({"a": jnp.ones(2), "b": jnp.ones(2)}, tx.init(params), params)
  assert updates["a"].tolist() == [1.0, 0.0]
  assert updates["b"].tolist() == [1.0, 1.0]


def test_pruned_gradients_do_not_count_in_the_clipping_norm():
  chain = optax.chain(optax.clip_by_global_norm(1.0), optax.scale(-1.0))
  tx = masking.keep_masks({"a": np.array([True, False])}, chain)
  params = {"a": jnp.zeros(2)}
  updates, _ = tx.update({"a": jnp.array([0.5, 100.0])}, tx.init(params), params)
  np.testing.assert_allclose(updates["a"], [-0.5, 0.0], rtol=1e-6)


def test_a_nonfinite_pruned_gradient_does_no_harm():
  tx = masking.keep_masks({"a": np.array([True, False])}, optax.sgd(1.0))
  params = {"a": jnp.zeros(2)}
  updates, _ = tx.update({"a": jnp.array([1.0, jnp.nan])}, tx.init(params), params)
  assert updates["a"].tolist() == [-1.0, 0.0]


def test_the_callers_masks_survive_a_donated_state():
  masks = {"a": jnp.array([True, False])}
  tx = masking.keep_masks(masks)
  params = {"a": jnp.ones(2)}
  step = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=1)
  step({"a": jnp.ones(2)}, tx.init(params))
  assert masks["a"].tolist() == [True, False]


def test_holes_have_no_mask_and_shapes_must_agree():
  masks = {"a": np.ones(2, bool), "b": np.ones(3, bool)}
  state = masking.keep_masks(masks).init({"a": None, "b": jnp.ones(3)})
  assert state.masks["a"] is None
  with pytest.raises(ValueError, match=r"mask of b has shape \(3,\)"):
    masking.keep_masks(masks).init({"a": None, "b": jnp.ones(4)})
