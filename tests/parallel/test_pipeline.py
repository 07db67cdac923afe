"""Pipelines: the schedule, and the loop in results, gradients, memory and messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.core import errors
from effjax.core import shard as shard_lib
from effjax.parallel import collectives, grouping, pipeline
from effjax.parallel import spread as spread_lib

MOST_STAGES, MOST_STEPS = 6, 4 * 12 + 5


@st.composite
def _schedules(draw):
  num_stages, repeats = draw(st.integers(1, MOST_STAGES)), draw(st.integers(1, 4))
  least = 1 if repeats == 1 else num_stages
  return pipeline.Schedule(num_stages, draw(st.integers(least, 12)), repeats)


@given(_schedules())
def test_every_micro_batch_passes_every_group_once_and_in_order(schedule):
  # Arrays of one shape, so that what works on them is compiled once.
  place = schedule.at(np.arange(MOST_STEPS)[:, None], np.arange(MOST_STAGES)[None])
  cut = (slice(schedule.num_steps), slice(schedule.num_stages))
  repeat, micro_batch, valid = (np.asarray(a)[cut] for a in place)
  group = repeat * schedule.num_stages + np.arange(schedule.num_stages)[None]
  passed = {}
  for step, stage in zip(*np.nonzero(valid), strict=True):
    passed.setdefault(micro_batch[step, stage], []).append(group[step, stage])
  assert sorted(passed) == list(range(schedule.micro_batches))
  assert all(groups == list(range(schedule.num_groups)) for groups in passed.values())
  assert valid[0].any() and valid[-1].any()
  assert schedule.bubble == pytest.approx(1 - valid.mean())


@given(_schedules())
def test_groups_are_sent_to_where_they_are_used(schedule):
  num_stages, repeats = schedule.num_stages, schedule.repeats
  held = np.full((num_stages, repeats), -1)
  for pairs, sources, targets in grouping._rounds(num_stages, repeats):
    assert sorted(receiver for _, receiver in pairs) == list(range(num_stages))
    for sender, receiver in pairs:
      held[receiver, targets[receiver]] = sender * repeats + sources[sender]
  expected = np.arange(num_stages)[:, None] + num_stages * np.arange(repeats)[None]
  np.testing.assert_array_equal(held, expected)


def _close(found, expected, tolerance=1e-5):
  found, expected = jax.device_get((found, expected))
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert np.max(np.abs(a - b)) <= tolerance * max(1, np.max(np.abs(b)))


def _toy(params, x_BLD, rows, first, key):
  """Layers that do not commute, know their number and the rows they are given."""
  del key

  def one(x_BLD, xs):
    w_D, number = xs
    x_BLD = jnp.tanh(x_BLD * w_D[None, None] + 0.1 * rows[..., None] + 0.01 * number)
    return x_BLD, {"mean": jnp.mean(x_BLD * number), "first": first}

  return jax.lax.scan(one, x_BLD, (params["w"], first + jnp.arange(len(params["w"]))))


def _weighted(run_fn, params, x_BLD):
  y_BLD, written = run_fn(params, x_BLD)
  # Weights that differ, so that no exchange of rows goes unseen.
  loss = jnp.sum(y_BLD * jnp.arange(y_BLD.size).reshape(y_BLD.shape) / y_BLD.size)
  return loss + jnp.sum(written["mean"] ** 2), (y_BLD, written)


@pytest.mark.parametrize(
  ("num_stages", "micro_batches", "repeats"),
  [(1, 2, 1), (4, 2, 1), (2, 6, 1), (3, 3, 2), (2, 6, 3)],
)
def test_the_loop_equals_one_layer_after_the_other(num_stages, micro_batches, repeats):
  schedule = pipeline.Schedule(num_stages, micro_batches, repeats)
  x_BLD = jax.random.normal(jax.random.key(0), (12, 2, 4))
  rows = jnp.arange(24).reshape(12, 2)
  num_layers = 2 * schedule.num_groups
  params = {"w": jax.random.normal(jax.random.key(1), (num_layers, 4))}

  def piped(params, x_BLD):
    return pipeline.run(schedule, _toy, params, x_BLD, rows)

  def plain(params, x_BLD):
    parts = [slice(m, None, micro_batches) for m in range(micro_batches)]
    found = [_toy(params, x_BLD[part], rows[part], 0, None) for part in parts]
    y_BLD = jnp.stack([y for y, _ in found], axis=1).reshape(x_BLD.shape)
    means = jax.tree.map(lambda *a: sum(a) / len(a), *(w for _, w in found))
    return y_BLD, means

  results = [
    jax.jit(
      jax.value_and_grad(
        functools.partial(_weighted, run_fn), argnums=(0, 1), has_aux=True
      )
    )(params, x_BLD)
    for run_fn in (piped, plain)
  ]
  first = results[0][0][1][1].pop("first")
  np.testing.assert_array_equal(first, np.arange(num_layers) // 2 * 2)
  results[1][0][1][1].pop("first")
  _close(*results)


def test_what_a_bubble_computes_reaches_nothing():
  # Group g can only stand what group g - 1 gives: anything else is no number, in its
  # result and in its derivative.
  def stage_fn(params, x_BLD, rows, first, key):
    del rows, key
    y_BLD = params["w"][0] * jnp.sqrt(x_BLD - first)
    return y_BLD + first + 1, {"least": jnp.min(y_BLD)[None]}

  def loss(params, x_BLD, schedule):
    if schedule is not None:
      y_BLD, written = pipeline.run(schedule, stage_fn, params, x_BLD)
      return jnp.sum(y_BLD**2) + jnp.sum(written["least"])
    least = jnp.zeros(4)
    for g in range(4):
      group = jax.tree.map(lambda a, g=g: a[g : g + 1], params)
      ys = []
      for m in range(2):
        y_BLD, written = stage_fn(group, x_BLD[m : m + 1], (), g, None)
        ys.append(y_BLD)
        least = least.at[g].add(written["least"][0] / 2)
      x_BLD = jnp.concatenate(ys)
    return jnp.sum(x_BLD**2) + jnp.sum(least)

  x_BLD = jax.random.uniform(jax.random.key(0), (2, 3, 4), minval=0.5, maxval=1.5)
  params = {"w": jnp.array([0.9, 1.1, 1.0, 0.8])}
  assert not bool(jnp.isfinite(jnp.sqrt(x_BLD - 3)).all())
  grad_fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
  expected = grad_fn(params, x_BLD, None)
  for schedule in (pipeline.Schedule(4, 2), pipeline.Schedule(2, 2, 2)):
    found = grad_fn(params, x_BLD, schedule)
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(found))
    _close(found, expected)


def _product(params, x_BLD, rows, first, key):
  del rows, first, key
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), ()), x_BLD, params)


@pytest.mark.parametrize("repeats", [1, 2])
def test_parameters_are_not_held_for_every_step(repeats):
  num_layers, dim = 4, 64
  params = jax.ShapeDtypeStruct((num_layers, dim, dim), jnp.float32)

  def peak(micro_batches):
    schedule = pipeline.Schedule(2, micro_batches, repeats)
    x_BLD = jax.ShapeDtypeStruct((micro_batches, 1, dim), jnp.float32)
    loss = lambda *args: jnp.sum(pipeline.run(schedule, _product, *args)[0])
    compiled = jax.jit(jax.grad(loss)).lower(params, x_BLD).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  growth = (peak(12) - peak(4)) / (8 * repeats)  # Bytes a step.
  assert 0 < growth < dim * dim * 4  # One layer of them.


@pytest.mark.parametrize("repeats", [1, 2])
def test_devices_send_activations_to_their_neighbours_and_nothing_else(repeats):
  spread = spread_lib.over("pp", shape={"stage": 4}, repeats=repeats)
  params = jnp.zeros((8, 16, 16))
  params = jax.device_put(params, NamedSharding(spread.mesh, P("stage")))

  def loss(params, x_BLD):
    with spread.active():
      y_BLD, _ = pipeline.run(pipeline.current(), _product, params, x_BLD)
    return jnp.sum(y_BLD**2)

  grad_fn = jax.jit(jax.grad(loss, argnums=(0, 1)))
  text = grad_fn.lower(params, jnp.zeros((4, 3, 16))).compile().as_text()
  sent = [(one.kind, one.num_bytes, one.times) for one in collectives.find(text)]
  micro_batch, group = 3 * 16 * 4, 16 * 16 * 4
  wanted = [
    # Each step to the next stage, and back.
    *[("collective-permute", micro_batch, 4 * repeats + 3)] * 2,
    # The result to the stages that its rows are of, and its gradient back.
    *[("all-to-all", 4 * micro_batch, 1)] * 2,
    # The gradient of the input, which every stage has all of here.
    ("all-reduce", 4 * micro_batch, 1),
    # Groups that do not lie where they are used, and their gradients.
    *[("collective-permute", group, 1)] * (2 * repeats if repeats > 1 else 0),
  ]
  assert sorted(sent) == sorted(wanted)


def test_stages_may_be_spread_over_devices_themselves():
  spread = spread_lib.over("pp+ring", shape={"stage": 2, "context": 2}, repeats=2)

  def stage_fn(params, x_BLD, rows, first, key):
    del rows, first, key

    def one(x_BLD, w_DD):
      # Every token sees the mean over all, which lie on two devices.
      mean = lambda x_BLD: jax.lax.pmean(x_BLD.mean(1, keepdims=True), "context")
      mix = lambda x_BLD: x_BLD + mean(x_BLD)
      if not shard_lib.split_over("length"):
        mix = lambda x_BLD: x_BLD + x_BLD.mean(1, keepdims=True)
        return jnp.tanh(mix(x_BLD) @ w_DD), ()
      axes = ("batch", "length", None)
      x_BLD = shard_lib.on_devices(mix, (x_BLD,), (axes,), axes, {"length": 4})
      return jnp.tanh(x_BLD @ w_DD), ()

    return jax.lax.scan(one, x_BLD, params)

  def loss(spread, params, x_BLD):
    with spread.active():
      if pipeline.current() is None:
        return jnp.sum(stage_fn(params, x_BLD, (), 0, None)[0] ** 2)
      return jnp.sum(pipeline.run(pipeline.current(), stage_fn, params, x_BLD)[0] ** 2)

  params = jax.random.normal(jax.random.key(0), (4, 4, 4)) / 2
  x_BLD = jax.random.normal(jax.random.key(1), (4, 4, 4))
  found, expected = (
    jax.jit(jax.value_and_grad(functools.partial(loss, s), argnums=(0, 1)))(
      params, x_BLD
    )
    for s in (spread, spread_lib.over("dp", num_devices=1))
  )
  _close(found, expected)


def test_what_cannot_go_around():
  with pytest.raises(
    errors.InputError, match="does not divide into mesh.micro_batches"
  ):
    schedule = pipeline.Schedule(2, 4)
    pipeline.run(schedule, _product, jnp.zeros((2, 4, 4)), jnp.zeros((6, 1, 4)))
  message = "of the pipeline for 4 devices along data; make it a multiple of 8$"
  spread = spread_lib.over("pp+dp", shape={"stage": 2, "data": 4})
  with spread.active(), pytest.raises(errors.InputError, match=message):
    schedule = pipeline.current()
    pipeline.run(schedule, _product, jnp.zeros((2, 4, 4)), jnp.zeros((4, 1, 4)))
  message = (
    r"^mesh.repeats=2 over 4 stages needs as many micro-batches, not "
    r"mesh.micro_batches=2; make them 4 or more, or repeats 1$"
  )
  with pytest.raises(errors.InputError, match=message):
    spread_lib.over("pp", shape={"stage": 4}, micro_batches=2, repeats=2)


def test_rows_are_of_all_stages_after_the_last_layer():
  def rows(x_BLD, axis):
    with spread.active():
      return shard_lib.shard(x_BLD, (axis, None, None))

  spread = spread_lib.over("pp+fsdp", shape={"stage": 2, "fsdp": 2})
  rows_fn = jax.jit(rows, static_argnums=1)
  assert rows_fn(jnp.zeros((8, 2, 2)), "rows_out").sharding.spec == P(("fsdp", "stage"))
  assert rows_fn(jnp.zeros((8, 2, 2)), "batch").sharding.spec == P("fsdp")


def test_a_spread_opens_its_schedule():
  assert pipeline.current() is None
  with spread_lib.over("pp+fsdp", shape={"fsdp": 2}, micro_batches=6).active():
    assert pipeline.current() == pipeline.Schedule(4, 6)
  with spread_lib.over("pp", repeats=2).active():
    assert pipeline.current() == pipeline.Schedule(8, 8, 2)
  with spread_lib.over("pp+fsdp", shape={"stage": 1, "fsdp": 8}).active():
    assert pipeline.current() is None
