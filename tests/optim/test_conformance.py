"""What every registered optimizer must do, whatever its update rule."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import registry, tree
from effjax.optim import config
from effjax.parallel import sharding

NAMES = registry.names(config.OPTIMIZERS)
# Factoring must be on at these sizes, or Adafactor's row and column state is not seen.
OPTIONS = {"adafactor": {"min_dim": 4}}


def build(name, specs, masks=None, clip_norm=None, rate=0.01, **options):
  options = OPTIONS.get(name, {}) | {"weight_decay": 0.1} | options
  cfg = config.OptimizerConfig(
    name=name,
    learning_rate=rate,
    schedule="constant",
    options=options,
    clip_norm=clip_norm,
  )
  return config.build(cfg, specs, num_steps=10, masks=masks)[0]


def make_step(tx):
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step)


def run(tx, params, gradients, step=None):
  step = step or make_step(tx)
  state = jax.jit(tx.init)(params)
  for grads in gradients:
    params, state = step(params, state, grads)
  assert step._cache_size() == 1
  return params, state


@pytest.fixture(scope="module", params=NAMES)
def case(request, toy):
  """One optimizer, a start, gradients that differ by layer, and where they lead."""

  def spread(_, gradient, spec):
    # Layers of very different size, so that a norm over the whole stack would show.
    values = np.array(gradient)
    if spec.stack:
      for index, factor in enumerate((0.01, 1.0, 100.0)):
        values[index] *= factor
    return jnp.asarray(values)

  grads = [toy.random_like(toy.specs, seed=seed) for seed in (1, 2, 3)]
  grads = [tree.map_leaves(spread, g, toy.specs) for g in grads]
  params = toy.random_like(toy.specs, seed=0)
  tx = build(request.param, toy.specs)
  end, _ = run(tx, params, grads)
  return types.SimpleNamespace(
    name=request.param, tx=tx, params=params, grads=grads, end=end
  )


def assert_close(actual, expected, tolerance=1e-5):
  actual, expected = tree.flatten(actual), tree.flatten(expected)
  assert actual.keys() == expected.keys()
  for path, b in expected.items():
    a, b = np.asarray(actual[path]), np.asarray(b)
    bound = tolerance * max(1, np.abs(b).max())
    np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=path)


def unstacked(values, specs, index):
  """Layer `index` of every stacked parameter, the others whole."""
  take = lambda _, v, spec: jnp.asarray(np.asarray(v)[index]) if spec.stack else v
  return tree.map_leaves(take, values, specs)


def zero_gradient_updates(name, specs, params, **options):
  tx = build(name, specs, **options)
  zeros = jax.tree.map(jnp.zeros_like, params)
  update = lambda: tx.update(zeros, tx.init(params), params)[0]
  return tree.flatten(jax.jit(update)())


def assert_decays(update, param):
  # Every rule decays towards zero, and by no more than the whole weight.
  assert np.all(np.sign(update) == -np.sign(param))
  assert np.all(np.abs(update) < np.abs(param))


@pytest.mark.parametrize("name", NAMES)
def test_with_zero_gradients_exactly_the_decayed_kinds_move(name, toy):
  params = toy.random_like(toy.specs, seed=0)
  flat_params, flat_specs = tree.flatten(params), tree.flatten(toy.specs)
  updates = zero_gradient_updates(name, toy.specs, params, decay_embedding=False)
  for path, update in updates.items():
    if flat_specs[path].kind in ("matrix", "conv"):
      assert_decays(update, flat_params[path])
    else:
      assert np.all(np.asarray(update) == 0), path
  # By default the embedding decays too.
  embed = {"embed": params["embed"]}
  updates = zero_gradient_updates(name, {"embed": toy.specs["embed"]}, embed)
  assert_decays(updates["embed/table"], embed["embed"]["table"])


def test_a_stacked_layer_moves_as_if_it_were_alone(case, toy):
  drop = lambda spec: toy.make_spec(
    spec.kind, spec.axes, spec.shape[len(spec.stack) :], spec.head_dim
  )
  tx = build(case.name, jax.tree.map(drop, toy.specs))
  step = make_step(tx)
  for index in range(3):
    take = lambda values, index=index: unstacked(values, toy.specs, index)
    grads = [take(g) for g in case.grads]
    alone, _ = run(tx, take(case.params), grads, step)
    assert_close(take(case.end), alone)


def test_holes_are_skipped_and_change_nothing_else(case):
  def with_holes(values):
    layer = values["run_0"]["layer_0"] | {"q": None, "norm": None}
    return {"embed": {"table": None}, "run_0": {"layer_0": layer}}

  # The specs the optimizer was made from have no holes.
  grads = [with_holes(g) for g in case.grads]
  holed, _ = run(case.tx, with_holes(case.params), grads)
  expected = tree.flatten(with_holes(case.end))
  for path, value in tree.flatten(holed).items():
    if expected[path] is None:
      assert value is None, path
    else:
      np.testing.assert_allclose(value, expected[path], rtol=1e-6, err_msg=path)


def test_pruned_weights_stay_exactly_zero(case, toy):
  pruned = ("q", "o", "table")
  prune = lambda path, p: np.asarray(p) > 0 if path.endswith(pruned) else None
  masks = tree.map_leaves(prune, case.params)
  apply = lambda _, p, mask: p if mask is None else jnp.asarray(np.asarray(p) * mask)
  params = tree.map_leaves(apply, case.params, masks)
  tx = build(case.name, toy.specs, masks=masks, clip_norm=1.0)
  trained, state = run(tx, params, case.grads)
  for path, mask in tree.flatten(masks).items():
    if mask is not None:
      values = np.asarray(tree.flatten(trained)[path])
      assert np.array_equal(values != 0.0, mask), path
      assert np.array_equal(tree.flatten(state.masks)[path], mask), path


def test_eight_devices_equal_one_and_state_is_laid_out_like_parameters(case, toy):
  mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
  table = (("embed", "a"), ("heads", "b"), ("inner", "b"), ("vocab", "b"))
  layout = lambda tree: sharding.state_shardings(mesh, table, toy.specs, tree)
  shardings = layout(case.params)
  state_shardings = layout(jax.eval_shape(case.tx.init, case.params))
  params, *grads = jax.device_put((case.params, *case.grads), (shardings,) * 4)
  state = jax.jit(case.tx.init, out_shardings=state_shardings)(params)

  def step(params, state, grads):
    updates, state = case.tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  jitted = jax.jit(step, out_shardings=(shardings, state_shardings))
  for g in grads:
    params, state = jitted(params, state, g)
  assert jitted._cache_size() == 1
  assert_close(params, case.end)
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    # Only counters and Adafactor's row over the taps of a convolution (3 x 4).
    if leaf.size > 12:
      part = leaf.addressable_shards[0].data.size
      assert part <= leaf.size // 2, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", NAMES)
def test_finds_the_minimum_of_a_quadratic(name, toy):
  target = toy.random_like(toy.specs, seed=5)
  loss_fn = lambda p: sum(
    jnp.sum(jnp.square(a - b))
    for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True)
  )
  num_steps = 150
  cfg = config.OptimizerConfig(
    name=name,
    learning_rate={"muon": 0.3, "sgd": 0.05}.get(name, 0.1),
    options=OPTIONS.get(name, {}) | {"weight_decay": 0.0},
    clip_norm=None,
  )
  tx, _ = config.build(cfg, toy.specs, num_steps)

  @jax.jit
  def train(params):
    def body(carry, _):
      params, state = carry
      updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(body, (params, tx.init(params)), length=num_steps)
    return carry[0]

  params = toy.random_like(toy.specs, seed=0)
  assert loss_fn(train(params)) < 1e-2 * loss_fn(params)
