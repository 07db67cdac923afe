"""The train step: accumulation, donation, partition, shardings, no recompilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import errors, precision
from effjax.train import state as state_lib


def _close(a, b, tolerance):
  a, b = jax.device_get((a, b))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.max(np.abs(x - y)) <= tolerance * max(1, np.max(np.abs(y)))


def test_one_update_is_gradient_descent(toy):
  model = toy.make_model()
  step, start = toy.build(model=model)
  batch = toy.batch()

  def mean_nll(params):
    logits, _ = model.apply({"params": params}, batch["inputs"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(nll * batch["weights"]) / jnp.sum(batch["weights"])

  loss, gradients = jax.jit(jax.value_and_grad(mean_nll))(toy.params)
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, toy.params, gradients)
  state, metrics = step(start(), step.put(batch))
  _close(state.params, expected, 1e-6)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  assert float(metrics["tokens"]) == batch["weights"].sum()
  assert int(state.step) == 1 and float(metrics["finite"]) == 1


def test_accumulation_equals_one_batch(toy):
  model = toy.make_model(auxiliary=0.0, counts=True)
  tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))
  # Parts hold unequal numbers of targets, so a mean of means would be wrong.
  batch = toy.batch()
  batch["weights"] = batch["weights"].at[:3].set(0)
  results = []
  for micro_batches in (1, 2, 8):
    step, start = toy.build(model=model, tx=tx, micro_batches=micro_batches)
    state = start()
    for _ in range(2):
      state, metrics = step(state, step.put(batch))
    results.append((state.params, metrics))
    assert float(state.collections["state"]["seen"]) == 2 * batch["inputs"].size
  _close(results[1], results[0], 1e-6)
  _close(results[2], results[0], 1e-6)


def test_the_state_is_donated_and_the_callers_parameters_are_not(toy):
  step, start = toy.plain
  state = start()
  before = jax.tree.leaves(state)
  step(state, step.put(toy.batch()))
  assert all(array.is_deleted() for array in before)
  assert not any(array.is_deleted() for array in jax.tree.leaves(toy.params))


def test_only_what_is_selected_trains(toy):
  step, start = toy.build(paths=frozenset({"up"}), tx=optax.adamw(0.1))
  state = start()
  assert state.params["table"] is None
  names = [name for name in state_lib.describe(state.opt_state) if "table" in name]
  assert names == []
  for _ in range(3):
    state, _ = step(state, step.put(toy.batch()))
  assert float(jnp.abs(state.params["up"] - toy.params["up"]).max()) > 0
  np.testing.assert_array_equal(step.frozen["table"], toy.params["table"])
  assert step.num_compilations() == 1


def test_what_cannot_train_is_refused(toy):
  with pytest.raises(errors.InputError, match="int8 and cannot be trained"):
    state_lib.split({"table": jnp.ones(3, jnp.int8)}, frozenset({"table"}))
  with pytest.raises(errors.InputError, match="no trainable"):
    state_lib.split(toy.params, frozenset())


def test_noise_depends_on_key_and_step_only(toy):
  step, start = toy.plain
  batch = step.put(toy.batch())
  first, again = step(start(), batch)[1], step(start(), batch)[1]
  later = step(start().replace(step=jnp.int32(1)), batch)[1]
  assert float(first["loss"]) == float(again["loss"]) != float(later["loss"])


@pytest.fixture(scope="module")
def on_one_device(toy):
  step, start = toy.build(tx=optax.adamw(0.01), micro_batches=2, model=toy.make_model())
  state = start()
  for _ in range(3):
    state, metrics = step(state, step.put(toy.batch(16)))
  return state.params, metrics


@pytest.mark.parametrize("preset", ["dp", "fsdp", "tp"])
def test_eight_devices_equal_one(toy, preset, on_one_device):
  step, start = toy.build(
    tx=optax.adamw(0.01),
    micro_batches=2,
    model=toy.make_model(),
    preset=preset,
    num_devices=8,
  )
  state = start()
  for _ in range(3):
    state, metrics = step(state, step.put(toy.batch(16)))
  assert step.num_compilations() == 1
  _close((state.params, metrics), on_one_device, 1e-5)
  if preset == "fsdp":
    moments = jax.tree.leaves(state.opt_state[0].mu)
    assert not any(m.sharding.is_fully_replicated for m in moments)


def test_a_large_replicated_array_is_refused(toy):
  tx = optax.GradientTransformation(
    lambda params: {"scratch": jnp.zeros((600, 500))}, lambda u, s, p=None: (u, s)
  )
  with pytest.raises(errors.InputError, match="scratch"):
    toy.build(preset="fsdp", num_devices=8, tx=tx)


def test_compute_dtype_is_a_policy(toy):
  step, start = toy.build(policy=precision.PrecisionConfig(compute="bfloat16"))
  state, low = step(start(), step.put(toy.batch()))
  step, start = toy.plain
  _, full = step(start(), step.put(toy.batch()))
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(state.params))
  assert 0 < abs(float(low["loss"]) - float(full["loss"])) < 0.05


def test_bad_batches(toy):
  step, _ = toy.build(micro_batches=3)
  with pytest.raises(errors.InputError, match="micro_batches=3"):
    step.put(toy.batch(8))


def test_a_batch_without_targets_changes_nothing(toy):
  step, start = toy.plain
  batch = toy.batch()
  batch["weights"] = jnp.zeros_like(batch["weights"])
  state, metrics = step(start(), step.put(batch))
  _close(state.params, toy.params, 0)
  assert float(metrics["finite"]) == 1
