"""What every registered kind of sparse training must do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import registry, tree
from effjax.optim import sparse, sparsity
from effjax.parallel import sharding

NAMES = registry.names(sparsity.SPARSIFIERS)
MATRICES = ("run_0/layer_0/o", "run_0/layer_0/q")


def test_all_are_listed():
  assert NAMES == ("gradual_magnitude", "movement", "rigl", "set", "static")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "adafactor"])
@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_exact_and_counts_and_moments_follow(training, name, optimizer):
  tx, _, target = training.make(name, optimizer=optimizer)
  assert tuple(target.shapes) == MATRICES
  seen = training.run(tx)
  for step, (params, state) in enumerate(seen):
    assert int(state.count) == step
    for path in MATRICES:
      mask = state.masks[path]
      np.testing.assert_array_equal(params[path][~mask], 0)
      found = training.moments(state.inner, path)
      assert len(found) == {"adamw": 2, "sgd": 1, "muon": 1, "adafactor": 1}[optimizer]
      for moment in found:
        if moment.shape == mask.shape:
          # Adafactor adds its eps of 1e-30 to squares.
          assert np.abs(moment[~mask]).max(initial=0) < 1e-29
    active = sum(m.sum() for m in state.masks.values())
    total = sum(m.size for m in state.masks.values())
    np.testing.assert_allclose(state.sparsity, 1 - active / total, atol=1e-6)
  end = seen[-1][1].masks
  for path in MATRICES:
    kept = end[path].shape[-1] * end[path].shape[-2]
    assert (end[path].sum((1, 2)) == kept - round(0.7 * kept)).all()
  # What is not made sparse trains as ever.
  start, last = seen[0][0], seen[-1][0]
  assert (last["embed/table"] != start["embed/table"]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_stacked_matrix_counts_by_itself_with_erk(training, name):
  tx, _, target = training.make(name, budget="erk", sparsity=0.5)
  state = training.run(tx)[-1][1]
  for path in MATRICES:
    assert (state.masks[path].sum((1, 2)) == target.num_kept(path)).all()


@pytest.mark.parametrize("name", NAMES)
def test_holes_and_masks_from_before_stay(training, name):
  flat = tree.flatten(training.params)
  kept = dict.fromkeys(flat) | {MATRICES[0]: np.asarray(flat[MATRICES[0]]) > 0}
  holed = lambda values: tree.unflatten(tree.flatten(values) | {"embed/table": None})
  start = tree.map_leaves(
    lambda _, p, mask: p if mask is None else jnp.asarray(np.where(mask, p, 0)),
    training.params,
    tree.unflatten(kept),
  )
  tx, _, target = training.make(name, masks=tree.unflatten(kept), where={"path": "/q$"})
  seen = training.run(tx, holed(start), lambda t: holed(training.gradients(t)))
  params, state = seen[-1]
  assert params["embed/table"] is None
  assert tuple(target.shapes) == MATRICES[1:]
  np.testing.assert_array_equal(params[MATRICES[0]] != 0, kept[MATRICES[0]])
  found = sparse.find(state)
  assert set(found.masks) == {MATRICES[1]}
  np.testing.assert_array_equal(params[MATRICES[1]][~found.masks[MATRICES[1]]], 0)


@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_equal_one_and_masks_are_laid_out_like_parameters(training, name):
  specs = training.toy.specs
  mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
  table = (("embed", "a"), ("heads", "b"), ("inner", "b"), ("vocab", "b"))
  layout = lambda tree: sharding.state_shardings(mesh, table, specs, tree)
  # Not Adam: its first steps of new weights have one size, so rounding would decide.
  tx, _, _ = training.make(name, optimizer="sgd")
  placed = layout(training.params)
  state_placed = layout(jax.eval_shape(tx.init, training.params))
  params = jax.device_put(training.params, placed)
  state = jax.jit(tx.init, out_shardings=state_placed)(params)
  params = jax.device_put(sparse.masked_params(params, state), placed)

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  jitted = jax.jit(step, out_shardings=(placed, state_placed))
  for t in range(training.num_steps):
    grads = jax.device_put(training.gradients(t), placed)
    params, state = jitted(params, state, grads)
  expected, end = training.run(tx)[-1]
  for path, values in tree.flatten(params).items():
    np.testing.assert_allclose(values, expected[path], rtol=1e-5, atol=1e-6)
  for path, mask in state.masks.items():
    np.testing.assert_array_equal(mask, end.masks[path])
    assert mask.addressable_shards[0].data.size == mask.size // 8


@pytest.mark.parametrize("name", NAMES)
def test_runs_under_vmap(training, name):
  tx, _, _ = training.make(name)
  stack = lambda t: jax.tree.map(lambda x: jnp.stack([x, 2 * x]), t)

  @jax.jit
  @jax.vmap
  def two_steps(params):
    state = tx.init(params)
    params = sparse.masked_params(params, state)
    for t in range(2):
      updates, state = tx.update(training.gradients(t), state, params)
      params = optax.apply_updates(params, updates)
    return params

  alone, _ = training.run(tx)[2]
  both = tree.flatten(two_steps(stack(training.params)))
  for path in MATRICES:
    np.testing.assert_allclose(both[path][0], alone[path], rtol=1e-5, atol=1e-6)
