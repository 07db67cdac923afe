"""Mixtures of experts as a layer: dispatches agree, padding, training, bad input."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import errors, specs
from effjax.core import tree as tree_lib
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.nn.mlps import moe
from effjax.optim import config as optim_config
from effjax.train.losses import cross_entropy

WIDTH, EXPERTS = 12, 4
KEY = jax.random.key(0)


def _module(**options):
  return moe.MoE(moe.MoEOptions(num_experts=EXPERTS, hidden_dim=6, **options), WIDTH)


def _params(module):
  params = module.init(KEY, jnp.ones((1, 2, WIDTH)))["params"]
  if "balance" in params:
    params["balance"] = jnp.linspace(0.0, 0.3, EXPERTS)
  return params


def _x(batch=2, length=9):
  return jax.random.normal(jax.random.key(1), (batch, length, WIDTH))


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"router": "switch"},
    {"router": "sigmoid", "routed_scale": 2.5, "num_shared": 1},
    {"router": "sigmoid", "num_groups": 2, "renormalize": False},
    {"top_k": 4},
  ],
)
def test_dispatches_agree_in_outputs_and_every_gradient(options):
  x_BLD, probe = _x(), jax.random.normal(jax.random.key(2), (2, 9, WIDTH))
  params = _params(_module(**options))

  def run(**dispatch):
    module = _module(**options, **dispatch)
    loss = lambda p, x: jnp.sum(module.apply({"params": p}, x) * probe)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x_BLD)

  dense = run(dispatch="dense")
  chex.assert_trees_all_close(run(dispatch="dropless"), dense, atol=1e-5, rtol=1e-5)
  # Room for all tokens with every expert: nothing is dropped.
  roomy = run(dispatch="capacity", eval_capacity_factor=float(EXPERTS))
  chex.assert_trees_all_close(roomy, dense, atol=1e-5, rtol=1e-5)
  assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(dense[1])) > 0


@pytest.mark.parametrize(
  "options",
  [
    {"dispatch": "dropless"},
    {"dispatch": "dense"},
    {"dispatch": "capacity", "eval_capacity_factor": 1.0},
    {"router": "expert_choice", "eval_capacity_factor": 0.5},
  ],
)
def test_padding_changes_no_token_and_gives_zeros(options):
  module = _module(**options)
  params, x_BLD = _params(module), _x()
  valid_BL = jnp.arange(9)[None] < jnp.array([[9], [5]])
  run = jax.jit(lambda x: module.apply({"params": params}, x, valid_BL))
  changed = jnp.where(valid_BL[..., None], x_BLD, 7.0)
  np.testing.assert_allclose(run(changed), run(x_BLD), atol=1e-5, rtol=1e-5)
  assert jnp.all(run(x_BLD)[~valid_BL] == 0)
  assert jnp.all(jnp.any(run(x_BLD)[0] != 0, axis=-1)) or "router" in options


def test_what_does_not_fit_is_dropped_and_reported():
  module = _module(router="switch", dispatch="capacity", eval_capacity_factor=0.9)
  params = _params(module)
  params["router"] = jnp.zeros_like(params["router"])  # all tokens to expert 0
  y_BLD, written = module.apply({"params": params}, _x(), mutable=["metrics"])
  # 18 tokens; 0.9 of an even share is 4.05 rows, rounded up to 8.
  assert jnp.sum(jnp.any(y_BLD != 0, axis=-1)) == 8
  assert float(written["metrics"]["router_dropped"]) == pytest.approx(10 / 18)
  assert float(written["metrics"]["router_load_max"]) == EXPERTS


def test_jitter_and_the_capacity_of_training_need_a_stream_of_noise():
  module = _module(jitter=0.3, dispatch="capacity", capacity_factor=0.25)
  params, x_BLD = _params(module), _x()
  still = module.apply({"params": params}, x_BLD)
  noisy = module.apply({"params": params}, x_BLD, rngs={"dropout": KEY})
  again = module.apply({"params": params}, x_BLD, rngs={"dropout": KEY})
  np.testing.assert_array_equal(noisy, again)
  assert jnp.any(still != noisy)


def _decoder(**options):
  mixer = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
  return decoder.Decoder(
    model_config.DecoderConfig(
      vocab_size=32,
      embed_dim=16,
      num_layers=3,
      first_mlps=("swiglu",),
      mlp_pattern=("moe",),
      mixer_options={"attention": mixer},
      mlp_options={
        "moe": {"num_experts": EXPERTS, "hidden_dim": 8} | options,
        "swiglu": {"hidden_dim": 24},
      },
      max_len=16,
    )
  )


@pytest.fixture(scope="module")
def balanced():
  """A decoder with loss-free balancing, its parameters and a batch."""
  model = _decoder(router="sigmoid", num_shared=1, balancing_loss=0.0)
  tokens_BL = jax.random.randint(KEY, (4, 10), 0, 32)
  params = jax.jit(model.init)(KEY, tokens_BL)["params"]
  weights = jnp.ones((4, 10))
  batch = {"inputs": tokens_BL, "targets": (7 * tokens_BL + 3) % 32, "weights": weights}
  return model, params, batch


def test_prefill_and_steps_equal_the_parallel_form(balanced):
  model, params, batch = balanced
  tokens_BL = batch["inputs"][:2]
  apply = jax.jit(model.apply)
  whole = apply({"params": params}, tokens_BL)[0]
  state = model.init_state(2, 16)
  first, state = apply({"params": params}, tokens_BL[:, :6], state=state)
  np.testing.assert_allclose(first, whole[:, :6], atol=1e-4, rtol=1e-4)
  for place in range(6, 10):
    token = tokens_BL[:, place : place + 1]
    logits, state = apply({"params": params}, token, state=state)
    np.testing.assert_allclose(logits[:, 0], whole[:, place], atol=1e-4, rtol=1e-4)
  assert state["length_B"].tolist() == [10, 10]


def _gradients(model, params, batch):
  loss_fn = cross_entropy.cross_entropy(cross_entropy.CrossEntropyOptions())

  def objective(params):
    loss = loss_fn(model, {"params": params}, batch, KEY)
    return loss.objective, loss

  return jax.jit(jax.grad(objective, has_aux=True))(params)


def test_the_bias_steps_by_its_rate_towards_even_loads(balanced):
  model, params, batch = balanced
  gradients, loss = _gradients(model, params, batch)
  assert float(loss.metrics["auxiliary_loss"]) == 0
  config = optim_config.OptimizerConfig(balance_rate=0.01, clip_norm=1e-3)
  tx, _ = optim_config.build(config, specs.specs(model), 10)
  updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
  flat = tree_lib.flatten(updates)
  (path,) = [path for path in flat if path.endswith("balance")]
  moved = np.asarray(flat[path])
  assert moved.shape == (2, EXPERTS)
  assert set(np.round(moved, 6).ravel()) <= {np.float32(s * 0.01) for s in (-1, 0, 1)}
  assert np.all(moved.min(axis=1) < 0) and np.all(moved.max(axis=1) > 0)
  excess = np.asarray(tree_lib.flatten(gradients)[path])
  np.testing.assert_array_equal(np.sign(moved), -np.sign(excess))


def test_loads_of_parts_of_a_batch_add_up(balanced):
  model, params, batch = balanced
  flat = lambda b: tree_lib.flatten(_gradients(model, params, b)[0])
  whole = flat(batch)
  parts = [
    flat({k: v[rows] for k, v in batch.items()}) for rows in (slice(2), slice(2, 4))
  ]
  (path,) = [path for path in whole if path.endswith("balance")]
  # Objectives are sums over targets, so gradients of parts add up to the whole.
  added = parts[0][path] + parts[1][path]
  np.testing.assert_allclose(1e6 * added, 1e6 * whole[path], atol=1e-4, rtol=1e-4)
  assert jnp.any(whole[path] != 0)


def test_training_with_a_balancing_loss_learns_and_evens_out():
  model = _decoder(balancing_loss=0.1, z_loss=1e-3)
  tokens_BL = jax.random.randint(KEY, (8, 12), 0, 32)
  params = jax.jit(model.init)(KEY, tokens_BL)["params"]
  tx = optax.adam(1e-2)
  loss_fn = cross_entropy.cross_entropy(cross_entropy.CrossEntropyOptions())

  def objective(params, key):
    tokens_BL = jax.random.randint(key, (8, 12), 0, 32)
    batch = {"inputs": tokens_BL, "targets": (tokens_BL + 1) % 32}
    batch["weights"] = jnp.ones((8, 12))
    loss = loss_fn(model, {"params": params}, batch, key)
    return loss.objective / loss.weight, loss

  @jax.jit
  def train(params, opt_state):
    def step(carry, key):
      params, opt_state = carry
      grads, loss = jax.grad(objective, has_aux=True)(params, key)
      updates, opt_state = tx.update(grads, opt_state)
      metrics = {k: v / loss.weight for k, v in loss.metrics.items()}
      return (optax.apply_updates(params, updates), opt_state), metrics

    return jax.lax.scan(step, (params, opt_state), jax.random.split(KEY, 60))[1]

  metrics = train(params, tx.init(params))
  assert float(metrics["cross_entropy"][-1]) < 0.5 * float(metrics["cross_entropy"][0])
  assert float(metrics["router_load_max"][-10:].mean()) < 1.5
  # At even loads the balancing loss is its weight times top_k, in both layers.
  auxiliary = float(metrics["auxiliary_loss"][-10:].mean())
  assert 2 * 0.1 * 2 <= auxiliary < 2 * 0.1 * 2 * 1.1


def test_layers_first_dense_then_by_pattern():
  values = {
    "vocab_size": 8,
    "embed_dim": 16,
    "num_layers": 5,
    "first_mlps": ("swiglu",),
    "mlp_pattern": ("moe", "swiglu"),
  }
  names = [layer.mlp for layer in model_config.DecoderConfig(**values).layers]
  assert names == ["swiglu", "moe", "swiglu", "moe", "swiglu"]
  with pytest.raises(errors.InputError, match="first_mlps names 2 MLPs"):
    model_config.DecoderConfig(
      **(values | {"num_layers": 1, "first_mlps": ("swiglu", "swiglu")})
    )


def test_expert_choice_sees_the_future_and_must_be_asked_for():
  with pytest.raises(errors.InputError, match="leak_future=True"):
    _decoder(router="expert_choice")
  model = _decoder(router="expert_choice", leak_future=True, eval_capacity_factor=0.5)
  tokens_BL = jax.random.randint(KEY, (1, 8), 0, 32)
  params = jax.jit(model.init)(KEY, tokens_BL)["params"]
  run = jax.jit(lambda t: model.apply({"params": params}, t)[0][0, :4])
  others = [run(tokens_BL.at[0, 4:].set(n)) for n in range(8)]
  assert any(bool(jnp.any(o != others[0])) for o in others)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"top_k": 9}, "top_k=9 must not exceed num_experts=8"),
    ({"num_experts": 0}, "num_experts must be positive, got 0"),
    ({"router": "topk"}, "unknown moe router 'topk'.*did you mean 'top_k'"),
    ({"dispatch": "dropping"}, "unknown moe dispatch 'dropping'"),
    ({"capacity_factor": 0.0}, "capacity_factor must be positive, got 0.0"),
    ({"jitter": 1.0}, "jitter must be from 0 to below 1"),
    ({"num_groups": 2}, "num_groups above 1 needs router='sigmoid'"),
    ({"router": "sigmoid", "num_groups": 3}, "must divide num_experts=8"),
    ({"router": "sigmoid", "num_groups": 4, "top_k": 3}, "must hold top_k=3"),
  ],
)
def test_bad_options_are_one_clear_line(options, message):
  with pytest.raises(errors.InputError, match=message) as error:
    moe.MoEOptions(**options)
  assert "\n" not in str(error.value)
