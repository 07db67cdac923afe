"""The experiment on sparse training, on a tiny network and random images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.sparse_training import compare, lottery, methods, tables
from experiments.sparse_training import network as network_lib

PLAN = network_lib.Plan(
  num_steps=12, every=2, batch_size=8, num_seeds=2, sizes=(12, 10, 6, 3)
)


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(0)
  make = lambda n: network_lib.Split(
    jnp.asarray(rng.integers(0, 256, (n, 12)), jnp.uint8),
    jnp.asarray(rng.integers(0, 3, n), jnp.int32),
  )
  return {"train": make(40), "validation": make(20), "test": make(30)}


@pytest.fixture(scope="module")
def network(data):
  return network_lib.Network(PLAN, data, 0.1)


@pytest.mark.parametrize("budget", ["uniform", "erk"])
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_ends_with_exact_counts_and_zeros(network, method, budget):
  kept = methods.numbers_kept(network, 0.75, budget)
  counted = []
  train = network.train

  def watched(params, opt_state, masks, revise=None):
    def counting(step, weights, masks, gradient):
      new = revise(step, weights, masks, gradient)
      if new is not None:
        counted.append((step, {p: np.asarray(m).sum((1, 2)) for p, m in new.items()}))
      return new

    return train(params, opt_state, masks, revise=counting if revise else None)

  network.train = watched
  try:
    params, masks = methods.train(network, method, 0.75, budget)
  finally:
    del network.train
  for path, mask in masks.items():
    assert (np.asarray(mask).sum((1, 2)) == kept[path]).all()
    np.testing.assert_array_equal(np.asarray(params[path])[~np.asarray(mask)], 0)
    assert (mask[0] != mask[1]).any()
  # Blocks end at 2, 4, ..., and masks change up to step 9 = 0.75 x 12.
  steps = [] if method == "static" else [2, 4, 6, 8]
  assert [step for step, _ in counted] == steps
  if method in ("set", "rigl"):
    for _, counts in counted:
      assert all((counts[path] == kept[path]).all() for path in kept)


def test_seeds_train_as_if_they_were_alone(data, network):
  params, _ = methods.train(network, "rigl", 0.75, "erk")
  alone = network_lib.Network(dataclasses.replace(PLAN, num_seeds=1), data, 0.1)
  one, _ = methods.train(alone, "rigl", 0.75, "erk")
  for path, values in one.items():
    np.testing.assert_allclose(values[0], params[path][0], rtol=1e-4, atol=1e-5)


def test_lottery_rounds_leave_exactly_what_they_say(network):
  params, _ = methods.train(network, "dense", 0.0, "uniform")
  left = {"hidden_0": [72, 43, 26, 16, 9, 6], "hidden_1": [36, 22, 13, 8, 5, 3]}
  before = None
  for round_ in range(1, lottery.ROUNDS + 1):
    masks = lottery.next_masks(network, params, round_)
    for path, mask in masks.items():
      size = mask[0].size
      assert left[path][round_ - 1] == size - round((1 - 0.6**round_) * size)
      assert (np.asarray(mask).sum((1, 2)) == left[path][round_ - 1]).all()
      # Tickets are nested: what is gone stays gone.
      assert before is None or not (np.asarray(mask) & ~before[path]).any()
    before = {path: np.asarray(mask) for path, mask in masks.items()}
    params = lottery.train(network, "ticket", masks, rewind=4)


def test_weights_are_rewound_and_controls_differ(network):
  params, opt_state = lottery.rewound(network, 4)
  straight = network.train(*network.init(), {}, stop=4)[0]
  for path, values in straight.items():
    np.testing.assert_array_equal(params[path], values)
  counts = [x for x in jax.tree.leaves(opt_state) if x.dtype == jnp.int32]
  assert counts and all((x == 4).all() for x in counts)
  masks = methods.random_masks(network, {"hidden_0": 40, "hidden_1": 20})
  made = {v: lottery.train(network, v, masks, 4) for v in compare.VARIANTS}
  for variant, found in made.items():
    active = np.asarray(found["hidden_0"]) != 0
    same = (active <= np.asarray(masks["hidden_0"])).all()
    assert same == (variant != "random")
    assert (active.sum((1, 2)) <= 40).all()


def test_the_study_resumes_and_reports(data, tmp_path, capsys):
  study = compare.Study(
    plan=PLAN,
    rates=(0.05, 0.1),
    sparsities=(0.5, 0.75),
    rounds=2,
    rewind=4,
    more=((1, 4), (2, 2)),
  )
  first = compare.Run(study, data, tmp_path)
  results = first.all()
  assert len(results) == 2 + 1 + 2 * 2 * 4 + 2 * 3 + 2 * (2 + 3)
  # A cell that is gone is made again, the same; others are left alone.
  gone = tmp_path / "cells" / "lottery-2-ticket.json"
  gone.unlink()
  other = (tmp_path / "cells" / "dense.json").stat().st_mtime_ns
  again = compare.Run(study, data, tmp_path).all()
  assert (tmp_path / "cells" / "dense.json").stat().st_mtime_ns == other
  for name, cell in results.items():
    assert again[name]["test"] == cell["test"]
  compare.report(study, results, tmp_path)
  text = (tmp_path / "tables.md").read_text()
  assert capsys.readouterr().out.strip() == text.strip()
  assert "| 75 % |" in text and "RigL - SET" in text
  assert (tmp_path / "accuracy.png").stat().st_size > 10_000
  with pytest.raises(SystemExit, match="of another study"):
    compare.Run(dataclasses.replace(study, rounds=1), data, tmp_path)


def test_intervals_are_students():
  # Of 1, 2, 3, 4, 5: mean 3, standard error 0.7071, t of 4 degrees 2.7764.
  mean, half = tables.paired(np.arange(1.0, 6.0), np.zeros(5))
  assert mean == 3.0
  assert half == pytest.approx(2.7764451 * np.sqrt(2.5 / 5), rel=1e-6)
