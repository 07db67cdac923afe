"""Adapters in the loop: they train alone, like the sum by hand, and resume."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.compress import registry
from effjax.core import partition, select, specs
from effjax.core import tree as tree_lib
from effjax.optim import config as optim_config
from effjax.parallel import spread as spread_lib
from effjax.train import adapters, loop
from effjax.train import state as state_lib
from effjax.weights.leaves import adapted, masked, quantized

STEPS, RANK = 6, 3
# Of "up" and "down", 8 x 16 both.
FACTORS = 2 * RANK * (8 + 16)


def _apply(toy, name, params, **options):
  return registry.find(name)(params, toy.specs, options=options)


def _adapt(toy, params, **options):
  return _apply(toy, "lora", params, rank=RANK, **options)


def _train(toy, params, **changes):
  values = {"model": toy.make_model(), "params": params} | changes
  return loop.train(**toy.arguments(**values))


def _same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


STARTS = {
  "plain": lambda toy: toy.params,
  "int4": lambda toy: _apply(toy, "rtn", toy.params, bits=4, group=8),
  "pruned": lambda toy: _apply(toy, "magnitude", toy.params, sparsity=0.6),
}


@pytest.fixture(params=STARTS)
def start(request, toy):
  return _adapt(toy, STARTS[request.param](toy))


def test_adapters_train_alone_and_the_loss_falls(toy, start):
  trained = _train(toy, start, config=toy.config(num_steps=30)).params
  assert jax.tree.structure(trained) == jax.tree.structure(start)
  moving, still = partition.partition(trained, {"up", "down"})
  before = partition.partition(start, {"up", "down"})
  _same(still, before[1])
  assert len(jax.tree.leaves(moving)) == 4
  for a, b in zip(jax.tree.leaves(moving), jax.tree.leaves(before[0]), strict=True):
    assert float(jnp.max(jnp.abs(a - b))) > 1e-3
  if isinstance(start["up"], masked.Masked):
    zeros = ~np.asarray(start["up"].mask())
    assert zeros.any() and not np.asarray(trained["up"].dense())[zeros].any()
  loss = lambda params: _loss(toy, params)
  assert loss(trained) < loss(start) - 0.05


def _loss(toy, params):
  fn, batch = toy.config().make_loss(), toy.batch(32)
  loss = fn(toy.make_model(), {"params": params}, batch, jax.random.key(0))
  return float(loss.objective / loss.weight)


def test_no_state_is_kept_of_what_stays(toy, start):
  paths = adapters.trained(start, toy.specs, select.Where())
  assert paths == {"up", "down"}
  tx, _ = optim_config.build(toy.config().optimizer, toy.specs, STEPS)
  state, frozen, _ = state_lib.place(
    toy.model, start, toy.specs, paths, tx, jax.random.key(0), toy.spread()
  )
  sizes = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree) if a.ndim >= 2)
  assert sizes(state.params) == 4 * FACTORS
  assert sizes(state.opt_state) == 2 * 4 * FACTORS
  held = sum(a.nbytes for a in jax.tree.leaves(start))
  kept = sum(a.nbytes for a in jax.tree.leaves(frozen))
  assert kept == held - 4 * FACTORS


def test_weight_decay_falls_on_the_factors(toy):
  start = _adapt(toy, toy.params)
  optimizer = optim_config.OptimizerConfig(
    name="adamw",
    learning_rate=0.1,
    schedule="constant",
    options={"weight_decay": 0.5},
  )
  trained = _train(
    toy, start, config=toy.config(num_steps=1, optimizer=optimizer)
  ).params
  # Beside a factor of zeros the other has no gradient: it only decays.
  for name in ("up", "down"):
    expected = np.asarray(start[name].down) * (1 - 0.1 * 0.5)
    np.testing.assert_allclose(trained[name].down, expected, rtol=1e-6)
    _same(trained[name].scale, start[name].scale)
    _same(trained[name].base, start[name].base)


def test_trains_like_the_dense_sum_by_hand(toy):
  """Plain SGD on A and B through `W + s A B`, against the leaf in the loop."""
  start = _adapt(toy, toy.params, alpha=2.0)
  batches = toy.batches()
  optimizer = optim_config.OptimizerConfig(
    name="sgd",
    learning_rate=0.5,
    schedule="constant",
    clip_norm=None,
    options={"momentum": 0.0},
  )
  model = toy.make_model()
  config = toy.config(num_steps=4, optimizer=optimizer)
  trained = _train(toy, start, model=model, batches=toy.batches(), config=config).params

  def objective(factors, batch):
    params = dict(toy.params)
    for name, (a, b) in factors.items():
      params[name] = toy.params[name] + 2.0 / RANK * a @ b
    loss = config.make_loss()(model, {"params": params}, batch, jax.random.key(0))
    return loss.objective / loss.weight

  factors = {name: (start[name].down, start[name].up) for name in ("up", "down")}
  for _ in range(4):
    grads = jax.jit(jax.grad(objective))(factors, next(batches))
    factors = jax.tree.map(lambda p, g: p - 0.5 * g, factors, grads)
  for name, (a, b) in factors.items():
    np.testing.assert_allclose(trained[name].down, a, atol=1e-5)
    np.testing.assert_allclose(trained[name].up, b, atol=1e-5)


@pytest.mark.parametrize(
  ("where", "expected"),
  [
    ({}, {"up", "down"}),
    ({"path": "."}, {"up", "down", "table"}),
    ({"path": "^up$"}, {"up"}),
    ({"kind": "embedding"}, {"table"}),
  ],
)
def test_what_is_selected_trains(toy, where, expected):
  start = _adapt(toy, toy.params)
  trained = _train(toy, start, where=where, config=toy.config(num_steps=2)).params
  changed = {
    path
    for path, leaf in tree_lib.flatten(trained).items()
    if any(
      not np.array_equal(a, b)
      for a, b in zip(jax.tree.leaves(leaf), jax.tree.leaves(start[path]), strict=True)
    )
  }
  assert changed == expected
  for name in ("up", "down"):
    _same(trained[name].base, start[name].base)


def test_without_adapters_everything_trains(toy):
  found = adapters.trained(toy.params, toy.specs, select.Where())
  assert found == {"up", "down", "table"}


def test_a_stopped_training_resumes_bit_for_bit(toy, start, tmp_path):
  class CrashError(Exception):
    """Stands for a process that died."""

  def crash(given):
    if given == 3:
      raise CrashError

  with pytest.raises(CrashError):
    _train(toy, start, workdir=tmp_path, batches=toy.hooked(crash))
  resumed = _train(toy, start, workdir=tmp_path).params
  straight = _train(toy, start).params
  assert jax.tree.structure(resumed) == jax.tree.structure(straight)
  _same(resumed, straight)


def test_merged_is_what_was_trained(toy):
  start = _adapt(toy, STARTS["pruned"](toy))
  trained = _train(toy, start).params
  merged = registry.find("merge_lora")(trained, toy.specs)
  for name in ("up", "down"):
    assert isinstance(merged[name], masked.Masked)
    expected = trained[name].dense()
    np.testing.assert_allclose(merged[name].dense(), expected, atol=1e-6)
    np.testing.assert_array_equal(merged[name].mask(), trained[name].mask())


def test_codes_stay_codes(toy):
  start = _adapt(toy, STARTS["int4"](toy))
  trained = _train(toy, start).params
  assert isinstance(trained["up"].base, quantized.Quantized)
  _same(trained["up"].base, start["up"].base)


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("preset", ["fsdp", "tp"])
def test_eight_devices_take_the_step_of_one(toy, preset, kind):
  start = _adapt(toy, STARTS[kind](toy))
  batch = next(toy.batches())
  tx = optax.adam(0.1)
  made = []
  for chosen, devices in ((preset, 8), ("dp", 1)):
    step, first = toy.build(
      model=toy.make_model(),
      params=start,
      paths=frozenset({"up", "down"}),
      tx=tx,
      preset=chosen,
      num_devices=devices,
    )
    state = first()
    for _ in range(2):
      state, _ = step(state, step.put(batch))
    made.append(jax.device_get(state.params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *made)


def test_state_of_adapters_is_split_like_they_are():
  """A moment of a large factor must not be held whole on every device."""
  spec = specs.ParamSpec(
    axes=("embed", "mlp"), kind="matrix", shape=(2, 64, 128), stack=("layers",)
  )
  leaf = adapted.Adapted.create(
    jnp.zeros((2, 64, 128)), jnp.zeros((2, 64, 4)), jnp.zeros((2, 4, 128)), 1.0
  )
  spread = spread_lib.over("fsdp")
  placed = spread.params({"w": spec}, {"w": leaf})["w"]
  trainable, _ = partition.partition({"w": leaf}, {"w"})
  state = jax.eval_shape(optax.scale_by_adam().init, trainable)
  moments = spread.state({"w": spec}, state).mu["w"]
  assert moments.down.spec == placed.down.spec
  assert not moments.down.is_fully_replicated
