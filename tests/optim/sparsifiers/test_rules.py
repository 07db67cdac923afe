"""Each kind of sparse training against its paper, step by step and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import tree
from effjax.optim import sparse
from tests.ops.sparsity.test_topology import naive_rigl

Q, O = "run_0/layer_0/q", "run_0/layer_0/o"


def test_gradual_magnitude_follows_the_formula_at_every_step(training):
  t0, dt, n, s_i, s_f = 2, 3, 3, 0.2, 0.85
  options = {"begin": t0, "every": dt, "num_updates": n, "initial_sparsity": s_i}
  tx, _, _ = training.make("gradual_magnitude", sparsity=s_f, options=options)
  seen = training.run(tx)
  pruned = 0
  for t, (_, state) in enumerate(seen):
    if t0 <= t <= t0 + n * dt and (t - t0) % dt == 0:
      share = s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt)) ** 3
      pruned = round(share * 8 * 16)
    for path in (Q, O):
      assert (8 * 16 - state.masks[path].sum((1, 2))).tolist() == [pruned] * 3, t
  assert pruned == round(s_f * 8 * 16)


def test_gradual_magnitude_prunes_the_smallest_after_the_step(training):
  # With SGD of one step at a time what the weights would have become is known.
  options = {"every": 1, "num_updates": 1}
  tx, _, _ = training.make("gradual_magnitude", optimizer="sgd", options=options)
  dense, _, _ = training.make("static", optimizer="sgd", sparsity=0.0)
  pruned, whole = training.run(tx)[1], training.run(dense)[1]
  w = whole[0][Q]
  for i in range(3):
    order = np.argsort(np.abs(w[i]).ravel(), kind="stable")
    gone = np.zeros(128, bool)
    gone[order[: round(0.7 * 128)]] = True
    np.testing.assert_array_equal(pruned[1].masks[Q][i].ravel(), ~gone)
    np.testing.assert_array_equal(pruned[0][Q][i].ravel()[gone], 0)
    kept = pruned[0][Q][i].ravel()[~gone]
    np.testing.assert_array_equal(kept, w[i].ravel()[~gone])


def test_gradual_magnitude_may_begin_sparse(training):
  options = {"every": 2, "num_updates": 2, "initial_sparsity": 0.5}
  tx, _, _ = training.make("gradual_magnitude", options=options)
  params, state = training.run(tx)[0]
  assert (state.masks[Q].sum((1, 2)) == 64).all()
  assert np.abs(params[Q][state.masks[Q]]).min() > 0.5


def test_static_stays(training):
  tx, _, _ = training.make("static")
  seen = training.run(tx)
  for _, state in seen:
    np.testing.assert_array_equal(state.masks[Q], seen[0][1].masks[Q])
  # Every matrix has a mask of its own.
  assert (seen[0][1].masks[Q][0] != seen[0][1].masks[Q][1]).any()


def test_movement_scores_are_added_up_by_hand(training):
  """Scores, masks and values of pruned weights, with plain SGD in NumPy."""
  options = {"every": 2, "num_updates": 3}
  tx, _, _ = training.make("movement", optimizer="sgd", options=options)
  seen = training.run(tx)
  scores, came_back = np.zeros((3, 8, 16), np.float32), 0
  mask = np.ones((3, 8, 16), bool)
  w = tree.flatten(training.params)[Q]
  for t in range(training.num_steps):
    gradient = training.flat_gradients(t)[Q]
    scores = scores - w * gradient
    found = seen[t + 1][1]
    np.testing.assert_allclose(found.scores[Q], scores, rtol=1e-5, atol=1e-5)
    # What was there moved; the rest is as it was.
    w = np.where(mask, seen[t + 1][0][Q] + found.held[Q], w)
    if (t + 1) % 2 == 0:
      share = 0.7 * (1 - max(0.0, 1 - (t + 1) / 6) ** 3)
      new = np.ones((3, 128), bool)
      for i in range(3):
        order = np.argsort(scores[i].ravel(), kind="stable")
        new[i, order[: round(share * 128)]] = False
      new = new.reshape(mask.shape)
      came_back += (new & ~mask).sum()
      mask = new
    np.testing.assert_array_equal(found.masks[Q], mask)
    np.testing.assert_array_equal(seen[t + 1][0][Q] + found.held[Q], w)
    np.testing.assert_array_equal(found.held[Q][mask], 0)
  assert came_back > 0


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_counts_are_conserved_and_topologies_move(training, name):
  tx, _, target = training.make(name)
  seen = training.run(tx)
  # RigL changes masks in place of the step t, SET after it. At 8 RigL's share is 0.01.
  changes = [3, 5, 7] if name == "rigl" else [2, 4, 6, 8]
  for t in range(1, len(seen)):
    before, after = seen[t - 1][1].masks, seen[t][1].masks
    for path in (Q, O):
      assert (after[path].sum((1, 2)) == target.num_kept(path)).all()
      assert (before[path] != after[path]).any() == (t in changes), t


def test_rigl_is_algorithm_1(training):
  tx, _, target = training.make("rigl", optimizer="sgd")
  # Gradients and weights of few values: ties everywhere.
  grads = lambda t: jax.tree.map(jnp.round, training.gradients(t))
  start = jax.tree.map(jnp.round, training.params)
  seen = training.run(tx, start, grads)
  for t in range(training.num_steps):
    (w, before), (new_w, after) = seen[t], seen[t + 1]
    if t == 0 or t % 2 or t >= 9:
      np.testing.assert_array_equal(before.masks[Q], after.masks[Q])
      assert (w[Q] != new_w[Q]).any()
      continue
    share = 0.3 / 2 * (1 + np.cos(np.pi * t / 9))
    moved = round(share * target.num_kept(Q))
    assert moved > 0 or t == 8
    gradient = np.asarray(tree.flatten(grads(t))[Q])
    for i in range(3):
      mask = naive_rigl(w[Q][i], before.masks[Q][i], gradient[i], moved)
      np.testing.assert_array_equal(after.masks[Q][i], mask)
    # No step: what stays is as it was, what is new is 0, here and everywhere.
    stays = before.masks[Q] & after.masks[Q]
    np.testing.assert_array_equal(new_w[Q], np.where(stays, w[Q], 0))
    for path in w.keys() - {Q, O}:
      np.testing.assert_array_equal(new_w[path], w[path])


@pytest.mark.parametrize("name", ["set", "rigl", "movement"])
def test_moments_of_weights_that_come_back_are_zero(training, name):
  options = {"every": 2} | ({"num_updates": 2} if name == "movement" else {})
  tx, _, _ = training.make(name, options=options)
  seen, number = training.run(tx), 0
  for (_, before), (_, after) in zip(seen, seen[1:], strict=False):
    new = after.masks[Q] & ~before.masks[Q]
    stays = after.masks[Q] & before.masks[Q]
    number += new.sum()
    for moment in training.moments(after.inner, Q):
      np.testing.assert_array_equal(moment[new], 0)
      assert (moment[stays] != 0).all()
  assert number > 0


def test_rigl_gives_each_step_its_learning_rate(training):
  by_update = training.sparsifier("rigl").rate(lambda step: step)
  steps = [t for t in range(training.num_steps) if t not in (2, 4, 6, 8)]
  assert [int(by_update(jnp.int32(i))) for i in range(len(steps))] == steps


def test_random_masks_follow_the_key_and_the_path(training):
  one, two = (training.make("static", key=key)[0] for key in (3, 4))
  a, b = one.init(training.params), two.init(training.params)
  assert (a.masks[Q] != b.masks[Q]).any()
  again = training.make("static", key=3)[0].init(training.params)
  np.testing.assert_array_equal(a.masks[Q], again.masks[Q])


def test_the_first_update_zeroes_what_init_could_not(training):
  tx, _, _ = training.make("static", optimizer="sgd")
  state = tx.init(training.params)
  updates, _ = tx.update(training.gradients(0), state, training.params)
  after = tree.flatten(updates)[Q] + tree.flatten(training.params)[Q]
  np.testing.assert_array_equal(np.asarray(after)[~state.masks[Q]], 0)
  masked = tree.flatten(sparse.masked_params(training.params, state))
  np.testing.assert_array_equal(masked[Q] != 0, state.masks[Q])
