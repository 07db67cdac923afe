"""Rotation: the same function for every mixer, its parts by NumPy, what it is for."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry as transforms
from effjax.compress.equivalent import _stream
from effjax.core import errors, layers, registry, specs
from effjax.core import tree as tree_lib
from effjax.measure import bytes as bytes_lib
from effjax.models import config, decoder, encoder, encoder_config
from effjax.ops.matmul import hadamard
from effjax.weights.leaves import masked, rotated
from tests import selection

VOCAB, WIDTH = 40, 32
# Mixers that only average values over tokens, from one matrix to one other.
VALUES = ("attention", "bigbird", "linear_attention", "mla", "performer")
# Small sizes for the options that a mixer has; all others are its defaults.
SMALL = {
  "head_dim": 8,
  "state_dim": 8,
  "chunk": 4,
  "num_heads": 4,
  "num_kv_heads": 2,
  "block": 2,
  "num_features": 32,
  "kv_rank": 16,
  "rope_dim": 8,
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """Most of the time here is XLA's; what is compared does not need its last effort."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def _build(**changes):
  """A model with norm scales and biases that are not those of an untrained one."""
  values = {
    "vocab_size": VOCAB,
    "embed_dim": WIDTH,
    "num_layers": 2,
    "max_len": 16,
    "tie_embeddings": False,
    "mixer_options": {"attention": {"head_dim": 8, "num_heads": 4, "num_kv_heads": 2}},
  }
  model = decoder.Decoder(config.DecoderConfig(**(values | changes)))
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCAB)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  spec_tree = specs.specs(model)
  return model, _trained(params, spec_tree), spec_tree, tokens_BL


def _trained(params, spec_tree):
  def change(path, leaf, spec):
    key = jax.random.fold_in(jax.random.key(2), len(path))
    if spec.kind == "norm":
      return leaf * jax.random.uniform(key, leaf.shape, minval=0.5, maxval=2.0)
    if spec.kind == "bias":
      return leaf + jax.random.normal(key, leaf.shape)
    return leaf

  return tree_lib.map_leaves(change, params, spec_tree)


def _rotate(model, params, spec_tree, where=None, **options):
  technique = transforms.find("rotation")
  return technique(model, params, spec_tree, where=where, options=options)


def _logits(model, params, tokens_BL):
  return jax.jit(model.apply)({"params": params}, tokens_BL)[0]


def _equal(got, expected, tolerance=1e-4):
  limit = tolerance * max(1.0, float(jnp.max(jnp.abs(expected))))
  assert float(jnp.max(jnp.abs(got - expected))) <= limit


def _mixer_options(name):
  fields = registry.find(config.MIXERS, name).options_cls.__dataclass_fields__
  return {name: {key: value for key, value in SMALL.items() if key in fields}}


@pytest.mark.parametrize(
  "mixer",
  selection.quick(registry.names(config.MIXERS), ("attention", "mamba2", "s4d")),
)
def test_every_mixer_keeps_its_function_or_is_refused(mixer):
  model, params, spec_tree, tokens_BL = _build(
    pattern=(mixer,), mixer_options=_mixer_options(mixer)
  )
  if mixer == "s4d":  # its state space works on the channels of the stream
    with pytest.raises(errors.InputError, match="cannot rotate run_0/layer_0/mixer/.*"):
      _rotate(model, params, spec_tree)
    return
  pairs = _stream.value_pairs(tree_lib.flatten(spec_tree))
  assert bool(pairs) == (mixer in VALUES)
  made, new = _rotate(model, params, spec_tree)
  assert made == model
  _equal(_logits(made, new, tokens_BL), _logits(model, params, tokens_BL))
  before, after = tree_lib.flatten(params), tree_lib.flatten(new)
  flat_specs = tree_lib.flatten(spec_tree)
  for path, spec in flat_specs.items():
    if "embed" in spec.instances and spec.kind == "norm":
      assert float(jnp.max(jnp.abs(after[path] - 1))) == 0
    elif "embed" in spec.instances:
      leaf = after[path].values if path.endswith("mlp/down") else after[path]
      assert float(jnp.max(jnp.abs(leaf - before[path]))) > 1e-3
  turned = [p for p in after if isinstance(after[p], rotated.Rotated)]
  assert turned == ["run_0/layer_0/mlp/down"]


@pytest.mark.parametrize(
  "changes",
  [
    pytest.param(
      {
        "mixer_options": {
          "attention": {
            "head_dim": 8,
            "num_heads": 4,
            "num_kv_heads": 2,
            "qk_norm": True,
            "bias": True,
          }
        },
        "mlp": "gelu",
        "position": "learned",
      },
      id="biases",
    ),
    pytest.param(
      {
        "mlp_pattern": ("swiglu", "moe"),
        "mlp_options": {
          "moe": {
            "num_experts": 3,
            "hidden_dim": 24,
            "router": "sigmoid",
            "num_shared": 1,
          }
        },
      },
      id="experts",
    ),
    pytest.param({"share_keys": 2}, id="borrowed-values"),
    pytest.param({"share": 2, "num_layers": 4, "logit_cap": 5.0}, id="shared-layers"),
    pytest.param({"embed_dim": 22, "scan": False}, id="no-hadamard"),
  ],
)
def test_other_parts_keep_the_function(changes, caplog):
  model, params, spec_tree, tokens_BL = _build(**changes)
  with caplog.at_level(logging.INFO, logger="effjax"):
    made, new = _rotate(model, params, spec_tree, seed=3)
  _equal(_logits(made, new, tokens_BL), _logits(model, params, tokens_BL))
  assert ("order 22 is known for the residual stream" in caplog.text) == (
    changes.get("embed_dim") == 22
  )
  assert "matrices of values by heads" in caplog.text


def test_the_parts_by_numpy():
  model, params, spec_tree, _ = _build()
  _, new = _rotate(model, params, spec_tree, seed=5)
  old, new = (
    {path: leaf for path, leaf in tree_lib.flatten(tree).items()}
    for tree in (params, new)
  )
  array = lambda leaf: np.asarray(leaf, np.float64)

  def turn(size):
    signs = hadamard.random_signs(jax.random.key(5), size)
    return array(signs)[:, None] * hadamard.hadamard_matrix(size) / np.sqrt(size)

  q = turn(WIDTH)
  np.testing.assert_allclose(q.T @ q, np.eye(WIDTH), atol=1e-12)
  layer = "run_0/layer_0"
  scale = array(old[f"{layer}/mixer_norm/scale"])[..., None]
  of_heads = lambda count: np.kron(np.eye(count), turn(8))
  close = lambda path, expected: np.testing.assert_allclose(
    new[path], expected, atol=1e-5
  )
  close("embed/table", array(old["embed/table"]) @ q)
  close(f"{layer}/mixer/q", q.T @ (scale * array(old[f"{layer}/mixer/q"])))
  values = q.T @ (scale * array(old[f"{layer}/mixer/v"])) @ of_heads(2)
  close(f"{layer}/mixer/v", values)
  close(f"{layer}/mixer/o", of_heads(4).T @ array(old[f"{layer}/mixer/o"]) @ q)
  hidden = old[f"{layer}/mlp/down"].shape[-2]
  h = hadamard.hadamard_matrix(hidden) / np.sqrt(hidden)
  down = new[f"{layer}/mlp/down"]
  np.testing.assert_allclose(
    down.values, h.T @ array(old[f"{layer}/mlp/down"]) @ q, atol=1e-5
  )
  assert down.block == hidden == 96
  final = array(old["final_norm/scale"])[:, None] * array(old["head"])
  close("head", q.T @ final)


def test_a_tied_head_becomes_one_of_its_own():
  model, params, spec_tree, tokens_BL = _build(tie_embeddings=True)
  made, new = _rotate(model, params, spec_tree)
  assert made.config.tie_embeddings is False
  assert new["head"].shape == (WIDTH, VOCAB)
  more = bytes_lib.held_bytes(new) - bytes_lib.held_bytes(params)
  assert more == 4 * WIDTH * VOCAB
  assert tree_lib.flatten(new).keys() == tree_lib.flatten(specs.specs(made)).keys()
  expected = _logits(model, params, tokens_BL)
  _equal(_logits(made, new, tokens_BL), expected)
  with pytest.raises(errors.InputError, match="final_norm/scale is not 1"):
    _rotate(model, params, spec_tree, untie=False)
  ones = {**params, "final_norm": {"scale": jnp.ones((WIDTH,))}}
  made, new = _rotate(model, ones, spec_tree, untie=False)
  assert made == model and "head" not in new
  _equal(_logits(made, new, tokens_BL), _logits(model, ones, tokens_BL))


def test_scanned_equals_layer_by_layer_and_shapes_are_foretold():
  model, params, spec_tree, _ = _build(tie_embeddings=True)
  made, new = _rotate(model, params, spec_tree)
  unrolled, flat = layers.unstack(model, params)
  made_flat, new_flat = _rotate(unrolled, flat, specs.specs(unrolled))
  apart_model, apart = layers.unstack(made, new)
  assert apart_model == made_flat
  assert jax.tree.structure(apart) == jax.tree.structure(new_flat)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), apart, new_flat
  )
  technique = transforms.find("rotation")
  shapes = jax.eval_shape(lambda: params)
  planned, foretold = technique.shapes(model, shapes, spec_tree)
  assert planned == made
  assert jax.tree.structure(foretold) == jax.tree.structure(new)
  same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
  assert all(jax.tree.leaves(jax.tree.map(same, foretold, new)))


def test_where_chooses_and_online_adds():
  model, params, spec_tree, tokens_BL = _build()
  expected = _logits(model, params, tokens_BL)
  with pytest.raises(errors.InputError, match="where leaves out .* rotated whole"):
    _rotate(model, params, spec_tree, where={"path": "mlp"})
  made, new = _rotate(
    model,
    params,
    spec_tree,
    where={"path": "mixer/"},
    stream=False,
    heads=False,
    online="mixer/(q|o)$",
  )
  old, flat = tree_lib.flatten(params), tree_lib.flatten(new)
  changed = [path for path in flat if flat[path] is not old[path]]
  assert changed == ["run_0/layer_0/mixer/o", "run_0/layer_0/mixer/q"]
  assert all(isinstance(flat[path], rotated.Rotated) for path in changed)
  _equal(_logits(made, new, tokens_BL), expected)
  _, new = _rotate(model, params, spec_tree, stream=False, down=False)
  flat = tree_lib.flatten(new)
  changed = [path for path in flat if flat[path] is not old[path]]
  assert changed == ["run_0/layer_0/mixer/o", "run_0/layer_0/mixer/v"]
  _equal(_logits(model, new, tokens_BL), expected)


def test_a_size_without_a_matrix_is_rotated_in_blocks(caplog):
  model, params, spec_tree, tokens_BL = _build(
    mlp="gelu", mlp_options={"gelu": {"hidden_dim": 92}}
  )
  with caplog.at_level(logging.WARNING, logger="effjax"):
    made, new = _rotate(model, params, spec_tree)
  assert "order 92 is known for the inputs of run_0/layer_0/mlp/down" in caplog.text
  assert new["run_0"]["layer_0"]["mlp"]["down"].block == 4
  _equal(_logits(made, new, tokens_BL), _logits(model, params, tokens_BL))


def test_what_cannot_be_rotated_is_refused_in_one_line():
  model, params, spec_tree, _ = _build(norm="layer")
  with pytest.raises(errors.InputError, match="subtracts the mean") as error:
    _rotate(model, params, spec_tree)
  assert "\n" not in str(error.value) and "final_norm" in str(error.value)
  model, params, spec_tree, _ = _build()
  gate = params["run_0"]["layer_0"]["mlp"]["gate"]
  mask = masked.Masked.create(gate, jnp.ones(gate.shape, bool))
  params["run_0"]["layer_0"]["mlp"]["gate"] = mask
  with pytest.raises(errors.InputError, match="mlp/gate is already a masked leaf"):
    _rotate(model, params, spec_tree, heads=False)
  with pytest.raises(errors.InputError, match="all off does nothing"):
    transforms.find("rotation").options(
      {"stream": False, "heads": False, "down": False}
    )
  with pytest.raises(errors.InputError, match="not a regular expression"):
    transforms.find("rotation").options({"online": "("})
  with pytest.raises(errors.InputError, match="found in no path"):
    _rotate(model, params, spec_tree, heads=False, online="nothing")


def test_an_encoder_is_refused():
  model = encoder.Encoder(
    encoder_config.EncoderConfig(
      vocab_size=VOCAB, embed_dim=WIDTH, num_layers=1, max_len=16
    )
  )
  tokens_BL = jnp.zeros((1, 4), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens_BL)["params"]
  with pytest.raises(errors.InputError, match="rotation takes decoders"):
    _rotate(model, params, specs.specs(model))


def _fake_int4(x, axis):
  """Round to nearest on 15 levels, one absmax scale along `axis`."""
  scale = np.abs(x).max(axis, keepdims=True) / 7
  return np.round(x / scale) * scale


def test_outlier_channels_no_longer_spoil_four_bits(rng):
  # Residual streams of language models have a few channels that are much larger.
  model, params, spec_tree, _ = _build(embed_dim=64)
  scale = np.ones(64)
  scale[[3, 17, 40]] = 30
  table = np.asarray(params["embed"]["table"]) * scale
  params = {**params, "embed": {"table": jnp.asarray(table, jnp.float32)}}
  _, new = _rotate(model, params, spec_tree, heads=False, down=False)
  error = {}
  for name, tree in (("before", params), ("after", new)):
    x = np.asarray(tree["embed"]["table"], np.float64)
    norm = np.asarray(tree["run_0"]["layer_0"]["mixer_norm"]["scale"][0], np.float64)
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True)) * norm
    w = np.asarray(tree["run_0"]["layer_0"]["mixer"]["q"][0], np.float64)
    error[name] = (
      np.square(_fake_int4(x, -1) @ w - x @ w).mean() / np.square(x @ w).mean()
    )
  assert error["after"] < error["before"] / 2


def test_outlier_inputs_of_a_weight_no_longer_spoil_four_bits(rng):
  # As after a norm with a few large scales is folded: some rows of W stand out.
  w = rng.standard_normal((128, 64))
  w[[5, 77, 100]] *= 30
  x = rng.standard_normal((256, 128))
  leaf = rotated.Rotated.create(jnp.asarray(w, jnp.float32))
  turned = np.asarray(leaf.values, np.float64)
  x_turned = np.asarray(leaf.rotate(jnp.asarray(x, jnp.float32)), np.float64)
  np.testing.assert_allclose(x_turned @ turned, x @ w, atol=1e-3)
  plain = np.square(x @ _fake_int4(w, 0) - x @ w).mean()
  after = np.square(x_turned @ _fake_int4(turned, 0) - x @ w).mean()
  assert after < plain / 2
