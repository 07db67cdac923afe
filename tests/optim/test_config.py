import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import config as config_lib
from effjax.core import errors, registry
from effjax.optim import config


def test_every_technique_is_listed_with_a_summary():
  optimizers = registry.names(config.OPTIMIZERS)
  assert optimizers == ("adafactor", "adamw", "lamb", "lion", "muon", "sgd")
  assert registry.names(config.SCHEDULES) == ("constant", "warmup_cosine", "wsd")
  for package in (config.OPTIMIZERS, config.SCHEDULES):
    for name in registry.names(package):
      assert len(registry.summary(package, name)) > 20


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"name": "adamv"}, ["unknown optimizer 'adamv'", "did you mean 'adamw'?"]),
    ({"schedule": "cosine"}, ["unknown schedule", "did you mean 'warmup_cosine'?"]),
    ({"options": {"decay": 1}}, ["'decay'", "did you mean 'weight_decay'?"]),
    ({"options": {"b1": "high"}}, ["options.b1 must be float"]),
    ({"options": {"b2": 1.0}}, ["b2 must be at least 0 and below 1: 1.0"]),
    ({"options": {"weight_decay": -1}}, ["weight_decay must not be negative"]),
    ({"name": "muon", "options": {"scale": "rsm"}}, ["'rsm'", "did you mean 'rms'?"]),
    ({"name": "muon", "options": {"ns_steps": 0}}, ["ns_steps must be positive"]),
    ({"options": {"momentum_dtype": "int8"}}, ["unknown momentum_dtype 'int8'"]),
    (
      {"schedule": "wsd", "schedule_options": {"decay_shape": "sqrt"}},
      ["unknown decay_shape 'sqrt'", "did you mean '1-sqrt'?"],
    ),
    ({"schedule_options": {"warmup": 5}}, ["schedule_options", "'warmup_steps'?"]),
    ({"schedule_options": {"final_fraction": 2}}, ["between 0 and 1: 2"]),
    ({"schedule_options": {"warmup_steps": -1}}, ["must not be negative: -1"]),
    ({"learning_rate": 0.0}, ["learning_rate must be positive"]),
    ({"clip_norm": -1.0}, ["clip_norm must be positive or None"]),
    ({"optimizer": "adamw"}, ["unknown field of config.train.optimizer"]),
  ],
)
def test_bad_input_is_one_clear_line(values, words):
  with pytest.raises(errors.InputError) as caught:
    config_lib.build(config.OptimizerConfig, values, "config.train.optimizer")
  message = str(caught.value)
  assert message.startswith(("config.train.optimizer", "unknown field of config"))
  assert "\n" not in message
  for word in words:
    assert word in message


@pytest.mark.parametrize(
  ("schedule", "options", "words"),
  [
    ("warmup_cosine", {"warmup_steps": 10}, "warmup_steps=10 must be less than"),
    ("wsd", {"warmup_steps": 6, "decay_fraction": 0.5}, "do not fit into 10 steps"),
  ],
)
def test_a_schedule_must_fit_into_the_run(schedule, options, words, toy):
  cfg = config.OptimizerConfig(schedule=schedule, schedule_options=options)
  with pytest.raises(errors.InputError, match=words):
    config.build(cfg, toy.specs, num_steps=10)


@pytest.mark.parametrize(("clip_norm", "moved"), [(None, 5.0), (1.0, 1.0), (9.0, 5.0)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm, moved, toy):
  specs = {name: toy.make_spec("bias", ("mlp",), (1,)) for name in ("a", "b")}
  cfg = config.OptimizerConfig(
    name="sgd",
    learning_rate=0.5,
    schedule="constant",
    options={"momentum": 0.0},
    clip_norm=clip_norm,
  )
  tx, rate_fn = config.build(cfg, specs, num_steps=10)
  grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  updates, _ = tx.update(grads, tx.init(grads), grads)
  norm = np.hypot(float(updates["a"][0]), float(updates["b"][0]))
  np.testing.assert_allclose(norm, 0.5 * moved, rtol=1e-6)
  assert float(rate_fn(3)) == 0.5


def test_the_schedule_moves_with_the_updates(toy):
  specs = {"a": toy.make_spec("bias", ("mlp",), (1,))}
  cfg = config.OptimizerConfig(
    name="sgd", learning_rate=1.0, options={"momentum": 0.0}, clip_norm=None
  )
  tx, rate_fn = config.build(cfg, specs, num_steps=5)
  params = {"a": jnp.ones(1)}
  state = tx.init(params)
  for step in range(5):
    updates, state = tx.update(params, state, params)
    np.testing.assert_allclose(-updates["a"][0], rate_fn(step), rtol=1e-6)
