"""Models that train in a pipeline as on one device, and what each stage then holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from effjax.core import errors, layers, specs
from effjax.core import tree as tree_lib
from effjax.models import config as config_lib
from effjax.models import decoder, encoder, encoder_config, stack
from effjax.parallel import spread as spread_lib
from effjax.train import state as state_lib
from effjax.train import step as step_lib
from effjax.train.losses import cross_entropy
from tests.conformance import leaf_kinds

ROWS, LENGTH, VOCAB = 8, 8, 32
ONE = spread_lib.over("dp", num_devices=1)


def _close(found, expected, tolerance=1e-5):
  found, expected = jax.device_get((found, expected))
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert np.max(np.abs(a - b)) <= tolerance * max(1, np.max(np.abs(b)))


def _config(**changes):
  values = {
    "vocab_size": VOCAB,
    "embed_dim": 16,
    "num_layers": 4,
    "mixer_options": {
      "attention": {"head_dim": 8},
      "mamba2": {"head_dim": 8, "state_dim": 4, "chunk": 4},
    },
  }
  if "moe" in (changes.get("mlp"), *changes.get("mlp_pattern", ())):
    moe = {"num_experts": 4, "hidden_dim": 8, "balancing_loss": 0.1, "z_loss": 0.01}
    values["mlp_options"] = {"moe": moe | changes.pop("moe", {})}
  return config_lib.DecoderConfig(**(values | changes))


def _batch():
  """Two documents a row, cut at other places in each, and a token of padding."""
  tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1), np.int32)
  place = np.arange(LENGTH)[None]
  cut = (np.arange(ROWS) % 5 + 1)[:, None]
  return {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "weights": np.broadcast_to(place < LENGTH - 1, (ROWS, LENGTH)).astype(np.float32),
    "segments": np.where(place == LENGTH - 1, 0, 1 + (place >= cut)).astype(np.int32),
    "positions": np.where(place >= cut, place - cut, place).astype(np.int32),
  }


@functools.cache
def _params(config):
  model = decoder.Decoder(config)
  return jax.jit(model.init)(jax.random.key(1), *model.example_inputs())["params"]


def _update(spread, config, micro_batches=1, params=None, trains=""):
  """The change by one step of gradient descent, and its metrics."""
  model = decoder.Decoder(config)
  params = _params(config) if params is None else params
  tree, tx = specs.specs(model), optax.sgd(1.0)
  paths = frozenset(
    path
    for path, leaf in tree_lib.flatten(params).items()
    if not trains or type(leaf).__name__ == trains
  )
  state, frozen, shardings = state_lib.place(
    model, params, tree, paths, tx, jax.random.key(2), spread
  )
  step = step_lib.make(
    model,
    cross_entropy.cross_entropy(cross_entropy.CrossEntropyOptions()),
    tx,
    lambda step: 1.0,
    frozen,
    shardings,
    specs=tree,
    spread=spread,
    micro_batches=micro_batches,
  )
  before = jax.device_get(state.params)
  state, metrics = step(state, step.put(_batch()))
  change = jax.tree.map(lambda a, b: a - b, before, jax.device_get(state.params))
  return change, {k: v for k, v in metrics.items() if k != "param_norm"}


MODELS = {
  "attention": _config(num_layers=8, remat="full"),
  "untied": _config(tie_embeddings=False, position="learned"),
  "mamba2": _config(pattern=("mamba2",), mlp="none"),
  "hybrid": _config(
    pattern=("attention", "attention", "mamba2"), num_layers=12, remat="dots"
  ),
  "shared": _config(num_layers=8, share=2),
  "shared_keys": _config(num_layers=8, share_keys=2),
  "dropless": _config(num_layers=8, mlp="moe"),
  "capacity": _config(mlp="moe", moe={"dispatch": "capacity", "capacity_factor": 4.0}),
  # As DeepSeek's: a dense layer first, biases that balance, an expert for all tokens.
  "deepseek": _config(
    mlp="moe",
    num_layers=5,
    first_mlps=("swiglu",),
    moe={"router": "sigmoid", "num_shared": 1, "balancing_loss": 0.0},
  ),
}


@functools.cache
def _on_one_device(name, micro_batches):
  return _update(ONE, MODELS[name], micro_batches)


@pytest.mark.parametrize(
  ("name", "num_stages", "micro_batches", "repeats", "others"),
  [
    ("attention", 4, 4, 2, {}),
    ("attention", 2, 4, 2, {"fsdp": 2}),
    ("attention", 2, 2, 1, {"tensor": 4}),
    ("attention", 4, 4, 1, {"data": 2}),
    ("attention", 2, 4, 1, {"context": 2}),
    ("untied", 2, 2, 1, {}),
    ("mamba2", 2, 4, 1, {}),
    pytest.param("hybrid", 2, 4, 2, {}, marks=pytest.mark.slow),
    ("shared", 4, 4, 1, {}),
    ("shared_keys", 2, 2, 2, {}),
    pytest.param("dropless", 4, 4, 2, {}, marks=pytest.mark.slow),
    ("capacity", 2, 4, 1, {"expert": 2}),
    ("deepseek", 2, 4, 2, {}),
  ],
)
def test_a_model_trains_as_on_one_device(
  name, num_stages, micro_batches, repeats, others
):
  parts = {
    "context": "ring",
    "data": "dp",
    "expert": "ep",
    "fsdp": "fsdp",
    "tensor": "tp",
  }
  spread = spread_lib.over(
    "+".join(["pp", *(parts[axis] for axis in others)]),
    shape={"stage": num_stages, **others},
    micro_batches=micro_batches,
    repeats=repeats,
  )
  change, metrics = _update(spread, MODELS[name])
  # Balancing losses are of a micro-batch, so they are compared with accumulation.
  expected, expected_metrics = _on_one_device(name, micro_batches)
  _close(change, expected)
  _close(metrics, expected_metrics)
  for path, gradient in tree_lib.flatten(expected).items():
    assert np.abs(gradient).max() > 0, path
    if path.endswith("balance"):  # Meant for its sign, and tiny.
      found = tree_lib.flatten(change)[path]
      np.testing.assert_allclose(found, gradient, rtol=1e-3, atol=1e-10)


def _piped(num_stages=2, **fields):
  return spread_lib.over("pp", shape={"stage": num_stages}, **fields)


def test_leaves_go_to_their_stages_whole():
  config = MODELS["untied"]
  params = dict(_params(config))
  make, key = leaf_kinds.KINDS["adapted_int4"], jax.random.key(3)
  params["run_0"] = tree_lib.unflatten(
    {
      path: make(key, w.shape, -2) if "mlp/" in path else w
      for path, w in tree_lib.flatten(params["run_0"]).items()
    }
  )
  found = _update(_piped(repeats=2), config, 1, params, "Adapted")
  assert len(jax.tree.leaves(found[0])) == 6  # Two factors of three matrices.
  _close(found, _update(ONE, config, 2, params, "Adapted"))


def test_a_stage_holds_its_part():
  config, tx = MODELS["deepseek"], optax.adamw(1e-3)
  model = decoder.Decoder(config)
  tree = specs.specs(model)
  spread = spread_lib.over("pp+fsdp", shape={"stage": 4, "fsdp": 2})
  paths = frozenset(tree_lib.flatten(tree))
  state, _, _ = state_lib.place(
    model, _params(config), tree, paths, tx, jax.random.key(0), spread
  )
  held = lambda a: a.addressable_shards[0].data.nbytes
  adam = state.opt_state[0]
  for part in (state.params, adam.mu, adam.nu):
    for path, array in tree_lib.flatten(part["run_1"]).items():
      # Also over the two devices of "fsdp", which divide all of these.
      assert held(array) * 8 == array.nbytes, path
    for array in jax.tree.leaves(part["run_0"]):  # The dense layer, on every stage.
      assert held(array) * 2 == array.nbytes


class _NoisyLayer(nn.Module):
  """Adds a number drawn for it."""

  @nn.compact
  def __call__(self, x_BLD, state, positions, segments, keys):
    noise = jax.random.uniform(self.make_rng("dropout"))
    self.put_variable("metrics", "noise", noise)
    return x_BLD + noise + self.param("w", nn.initializers.zeros, ()), state, keys


class _NoisyModel(nn.Module):
  """Eight layers of noise, scanned."""

  @nn.compact
  def __call__(self, x_BLD):
    make = lambda config, name: _NoisyLayer(name=name)
    places = jnp.zeros(x_BLD.shape[:2], jnp.int32)
    runs = (layers.Run(1, 8),)
    return stack.apply((None,) * 8, runs, make, x_BLD, None, places, places)[0]


def test_noise_is_of_a_layer_and_a_micro_batch():
  model, x_BLD = _NoisyModel(), jnp.zeros((8, 1, 1))
  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  params = model.init(rngs, x_BLD)["params"]

  def run(num_stages, repeats):
    spread = _piped(num_stages, micro_batches=4, repeats=repeats)

    def apply(params):
      with spread.active():
        return model.apply({"params": params}, x_BLD, rngs=rngs, mutable=["metrics"])

    return jax.jit(apply)(params)

  found = run(2, 1)
  y_B = np.asarray(found[0][:, 0, 0])
  noise_R = np.asarray(found[1]["metrics"]["run_0"]["layer_0"]["noise"])
  # Rows m and m + 4 are of one micro-batch.
  np.testing.assert_array_equal(y_B[:4], y_B[4:])
  assert len(np.unique(y_B)) == 4 and len(np.unique(noise_R)) == 8
  np.testing.assert_allclose(noise_R.sum(), y_B.mean(), rtol=1e-6)
  _close(run(4, 2), found)


def test_the_same_products_are_recomputed():
  def num_products(spread, remat):
    config = _config(remat=remat)
    model, tokens_BL = decoder.Decoder(config), jnp.zeros((2, 4), jnp.int32)

    def loss(params):
      with spread.active():
        return jnp.sum(model.apply({"params": params}, tokens_BL)[0])

    text = jax.jit(jax.grad(loss)).lower(_params(config)).as_text()
    return text.count("dot_general")

  for remat in ("full", "dots"):
    more = [num_products(s, remat) - num_products(s, "none") for s in (ONE, _piped())]
    assert more[0] == more[1] > 0


def test_an_encoder_goes_through_a_pipeline():
  config = encoder_config.EncoderConfig(
    vocab_size=VOCAB,
    embed_dim=16,
    num_layers=4,
    mixer_options={"attention": {"head_dim": 8}},
  )
  model = encoder.Encoder(config)
  batch = jax.tree.map(jnp.asarray, _batch())
  variables = jax.jit(model.init)(jax.random.key(0), batch["inputs"])

  def gradient(spread):
    def loss(variables):
      with spread.active():
        logits_BLV, _ = model.apply(
          variables, batch["inputs"], batch["positions"], batch["segments"]
        )
      return jnp.mean(logits_BLV**2)

    return jax.jit(jax.value_and_grad(loss))(variables)

  _close(gradient(_piped()), gradient(ONE))


def test_parameters_are_created_and_sequences_continued_as_ever():
  model = decoder.Decoder(MODELS["hybrid"])
  spread, tokens_BL = _piped(), jnp.zeros((3, 4), jnp.int32)

  def shapes():
    variables = model.init(jax.random.key(0), tokens_BL)
    return variables, model.apply(variables, tokens_BL, state=model.init_state(3, 8))

  expected = jax.eval_shape(shapes)
  with spread.active():
    assert jax.eval_shape(shapes) == expected


@pytest.mark.parametrize(
  ("changes", "fields", "message"),
  [
    (
      {"scan": False},
      {},
      "needs scanned layers, but the model's are unrolled; set sca",
    ),
    (
      {"num_layers": 7, "first_mlps": ("gelu",)},
      {"num_stages": 4},
      r"stage=4 x mesh.repeats=1 = 4 groups do not divide the longest of the model's "
      r"runs of equal layers \(1, 6\); with these repeats it could be 3 or 6 stages",
    ),
    ({"num_layers": 6}, {"repeats": 2}, r"\(6\); with these repeats it could be 3 sta"),
    ({"num_layers": 7}, {"repeats": 2}, r"\(7\); use no 'pp'"),
  ],
)
def test_models_that_cannot_be_cut(changes, fields, message):
  model = decoder.Decoder(_config(**changes))
  tokens_BL = jnp.zeros((8, 4), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens_BL)
  with _piped(**fields).active(), pytest.raises(errors.InputError, match=message):
    jax.eval_shape(model.apply, variables, tokens_BL)


def test_statistics_are_not_collected_in_a_pipeline():
  model = decoder.Decoder(MODELS["untied"])
  tokens_BL = jnp.zeros((2, 4), jnp.int32)
  variables = {"params": _params(MODELS["untied"])}
  with _piped().active(), pytest.raises(errors.InputError, match="without preset 'pp'"):
    model.apply(variables, tokens_BL, mutable=["stats"])
