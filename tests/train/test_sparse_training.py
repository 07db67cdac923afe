"""Sparse training in the loop: masks handed on, resumed, laid out, logged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import config as config_lib
from effjax.core import errors
from effjax.optim import sparsity
from effjax.train import config as train_config
from effjax.train import loop, writers
from effjax.weights.formats import base as format_base
from effjax.weights.leaves import fake_quantized, masked

OPTIONS = {
  "static": {},
  "movement": {"every": 2},
  "gradual_magnitude": {"every": 2},
  "set": {"every": 2},
  "rigl": {"every": 2},
}
NUM_STEPS = 8


def section(name, **values):
  given = {"sparsity": 0.75, "options": OPTIONS[name]} | values
  return sparsity.SparsityConfig(name=name, **given)


def train(toy, name, workdir=None, hook=None, start=None, **changes):
  """A training of 8 steps; `hook(n)` may break it at batch n."""
  config = toy.config(num_steps=NUM_STEPS, sparsity=section(name), checkpoint_every=3)
  values = {"config": config}
  if hook is not None:
    values["batches"] = toy.hooked(hook)
  if start is not None:
    values["params"] = start
  return loop.train(**toy.arguments(**values | changes), workdir=workdir)


def arrays(params):
  return [np.asarray(x) for x in jax.tree.leaves(params)]


class CrashError(Exception):
  """What a test breaks a run with."""


@pytest.mark.parametrize("name", OPTIONS)
def test_a_stage_hands_on_masked_leaves(toy, name, tmp_path):
  trained = train(toy, name, tmp_path)
  assert trained.num_compilations == 1
  for path in ("up", "down"):
    leaf = trained.params[path]
    assert isinstance(leaf, masked.Masked)
    mask = np.asarray(leaf.mask())
    assert mask.sum() == 8 * 16 // 4
    np.testing.assert_array_equal(np.asarray(leaf.values)[~mask], 0)
    assert (np.asarray(leaf.values)[mask] != 0).sum() > 0.5 * mask.sum()
  assert not isinstance(trained.params["table"], masked.Masked)
  logged = [r["sparsity"] for r in writers.read(tmp_path / "metrics.jsonl")]
  assert len(logged) == NUM_STEPS and logged[-1] == 0.75
  if name in ("gradual_magnitude", "movement"):
    # Changes at 2, 4 and 6: s = 0.75 (1 - (1 - j / 3)^3), of 128 weights.
    at = lambda j: round(0.75 * (1 - (1 - j / 3) ** 3) * 128) / 128
    expected = [0] + 2 * [at(1)] + 2 * [at(2)] + 3 * [at(3)]
    np.testing.assert_allclose(logged, expected, atol=1e-6)
  else:
    np.testing.assert_allclose(logged, 0.75, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_broken_off_and_resumed_equals_never_broken_off(toy, name, tmp_path):
  def crash(given):
    if given == 5:
      raise CrashError

  whole = train(toy, name, tmp_path / "whole")
  with pytest.raises(CrashError):
    train(toy, name, tmp_path / "broken", crash)
  again = train(toy, name, tmp_path / "broken")
  for a, b in zip(arrays(again.params), arrays(whole.params), strict=True):
    np.testing.assert_array_equal(a, b)
  rows = [
    [
      {k: v for k, v in row.items() if k not in writers.TIMED}
      for row in writers.read(tmp_path / folder / "metrics.jsonl")
    ]
    for folder in ("broken", "whole")
  ]
  assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["gradual_magnitude", "rigl"])
def test_eight_devices_equal_one(toy, name):
  alone = train(toy, name)
  spread = train(toy, name, spread=toy.spread("fsdp", 8))
  for path in ("up", "down"):
    a, b = spread.params[path], alone.params[path]
    np.testing.assert_array_equal(a.mask(), b.mask())
    np.testing.assert_allclose(a.values, b.values, rtol=1e-4, atol=1e-5)


def test_the_model_is_sparse_from_the_first_step(toy):
  """The first loss is that of the masked model, not of the dense one."""
  config = toy.config(num_steps=1, sparsity=section("static"))
  trained = train(toy, "static", config=config)
  masks = {path: trained.params[path].mask() for path in ("up", "down")}
  start = toy.params | {
    path: masked.Masked.create(toy.params[path], mask) for path, mask in masks.items()
  }
  plain = loop.train(**toy.arguments(params=start, config=toy.config(num_steps=1)))
  assert trained.metrics["loss"] == plain.metrics["loss"]
  for path in masks:
    a, b = (result.params[path].dense() for result in (trained, plain))
    np.testing.assert_array_equal(a, b)


def test_it_joins_masks_that_parameters_came_with(toy):
  mask = jnp.asarray(np.random.default_rng(0).random((8, 16)) < 0.5)
  start = toy.params | {"up": masked.Masked.create(toy.params["up"], mask)}
  with pytest.raises(errors.InputError, match="up is already pruned") as caught:
    train(toy, "rigl", start=start)
  assert "\n" not in str(caught.value)
  config = toy.config(
    num_steps=NUM_STEPS, sparsity=section("rigl", where={"path": "down"})
  )
  trained = train(toy, "rigl", start=start, config=config)
  np.testing.assert_array_equal(trained.params["up"].mask(), mask)
  assert trained.params["down"].mask().sum() == 32


def test_what_does_not_train_stays_dense(toy):
  trained = train(toy, "rigl", where={"path": "down|table"})
  assert not isinstance(trained.params["up"], masked.Masked)
  assert isinstance(trained.params["down"], masked.Masked)


def test_what_cannot_be_made_sparse_is_refused(toy):
  with pytest.raises(errors.InputError, match="selects no parameter that trains"):
    train(toy, "rigl", where={"kind": "embedding"})
  leaf = fake_quantized.FakeQuantized.create(
    toy.params["up"], format_base.FormatOptions(bits=4), jnp.full((1, 16), 0.1)
  )
  with pytest.raises(errors.InputError, match="up is a fake_quantized leaf"):
    train(toy, "rigl", start=toy.params | {"up": leaf})


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"name": "rigel"}, "unknown sparsifier 'rigel'; did you mean 'rigl'"),
    ({"sparsity": 1.0}, "sparsity=1.0 must be at least 0 and below 1"),
    ({"sparsity": -0.1}, "sparsity=-0.1 must be at least 0"),
    ({"budget": "owl"}, "unknown budget 'owl'"),
    ({"options": {"every": 0}}, "every must be positive: 0"),
    ({"options": {"every": 1}}, "every must be at least 2"),
    ({"options": {"every": 75}}, "no change of the masks comes before step"),
    ({"options": {"decay": "linear"}}, "unknown decay 'linear'"),
    ({"options": {"drop_fraction": 1.5}}, "drop_fraction must be between 0 and 1"),
    ({"options": {"evry": 2}}, "did you mean 'every'"),
    ({"name": "static", "options": {"every": 2}}, "unknown field"),
    ({"name": "gradual_magnitude", "options": {"begin": -1}}, "begin must not be neg"),
    (
      {"name": "gradual_magnitude", "options": {"begin": 60, "num_updates": 5}},
      "begin=60 and num_updates=5 with every=100 end at step 560, after num_steps=100",
    ),
    ({"name": "movement", "options": {"begin": 80}}, "no change of the masks fits"),
    ({"name": "movement", "options": {"num_updates": 0}}, "num_updates must be pos"),
    (
      {"name": "gradual_magnitude", "options": {"initial_sparsity": 1.0}},
      "initial_sparsity=1.0 must be",
    ),
    ({"where": {"kind": "matrices"}}, "unknown kind of parameter"),
  ],
)
def test_bad_sections_are_one_line(values, message):
  given = {"name": "rigl", "sparsity": 0.5, "options": {}} | values
  if given["options"] == {} and given["name"] == "rigl":
    given["options"] = {"every": 10}
  with pytest.raises(errors.InputError) as caught:
    config_lib.build(
      train_config.TrainConfig, {"num_steps": 100, "sparsity": given}, "options"
    )
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_matrix_that_would_be_empty_is_named(toy):
  config = toy.config(sparsity=section("static", sparsity=0.999))
  with pytest.raises(errors.InputError, match="nothing would be left of down, 16 x 8"):
    train(toy, "static", config=config)
