"""Training on a grid: what is trained, what is served, and that both are the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import api as compress
from effjax.compress import registry
from effjax.compress.quantize import _activation_scales
from effjax.core import errors, specs
from effjax.core import registry as core_registry
from effjax.models import config, decoder
from effjax.weights.formats import base
from effjax.weights.leaves import fake_quantized, low_rank, masked, quantized

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
EMBEDDING = specs.ParamSpec(axes=("vocab", "embed"), kind="embedding")
SPECS = {"w": MATRIX, "table": EMBEDDING, "norm": specs.ParamSpec(axes=(), kind="norm")}
WHERE = {"kind": ("matrix", "embedding")}


@pytest.fixture
def params(rng):
  return {
    "w": jnp.asarray(rng.standard_normal((2, 64, 32)), jnp.float32),
    "table": jnp.asarray(rng.standard_normal((40, 64)), jnp.float32),
    "norm": jnp.ones(4),
  }


def _apply(name, params, where=WHERE, **options):
  return registry.find(name)(params, SPECS, where=where, options=options)


_EVERY = [{"format": name} for name in core_registry.names(base.FORMATS)]
_MORE = [
  {"bits": 4, "group": 16},
  {"bits": 3, "symmetric": False},
  {"format": "ternary", "group": 16, "per_tensor": False},
  {"format": "nf4", "group": 16, "double_group": 8},
  {"format": "fp8", "variant": "e5m2"},
  {"format": "mxfp4", "scale_rule": "even"},
]


@pytest.mark.parametrize("options", _EVERY + _MORE, ids=str)
def test_hardened_at_once_is_round_to_nearest(params, options):
  fake = _apply("qat", params, **options)
  assert isinstance(fake["w"], fake_quantized.FakeQuantized)
  np.testing.assert_array_equal(fake["table"].values, params["table"])
  hard = registry.find("harden")(fake, SPECS)
  expected = _apply("rtn", params, **options)
  assert jax.tree.structure(hard) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(hard), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def _small():
  model = decoder.Decoder(
    config.DecoderConfig(
      vocab_size=32,
      embed_dim=64,
      num_layers=2,
      pattern=("attention",),
      mixer_options={"attention": {"head_dim": 16}},  # 64 inputs: a default group
      max_len=16,
    )
  )
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 8), 0, 32)
  return model, jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"], tokens_BL


_SLOW = [("qat", options) for options in _EVERY + _MORE] + [
  ("qat", {"bits": 4, "activations": "int4"}),
  ("qat", {"format": "fp8", "activations": "fp8"}),
  ("lsq", {"bits": 2, "group": 16}),
]


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("qat", {"format": "nf4", "group": 8}),
    ("qat", {"activations": "int8"}),
    ("lsq", {"bits": 3, "symmetric": False}),
    ("lsq", {"bits": 4, "activations": "int8"}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in _SLOW),
  ],
  ids=str,
)
def test_a_model_computes_the_same_before_and_after_hardening(name, options):
  model, params, tokens_BL = _small()
  tree = specs.specs(model)
  batches = [{"inputs": tokens_BL}]
  run = lambda name, params, options: compress.transform(
    registry.find(name), model, params, tree, batches, options=options
  )[1]
  fake = run(name, params, options)
  hard = run("harden", fake, None)
  apply = lambda params: model.apply({"params": params}, tokens_BL)[0]
  logits, expected = (jax.jit(apply)(tree) for tree in (fake, hard))
  np.testing.assert_array_equal(logits, expected)
  assert float(jnp.max(jnp.abs(expected - jax.jit(apply)(params)))) > 1e-4
  dots = [str(jax.make_jaxpr(apply)(tree)).count("int8_dot") for tree in (fake, hard)]
  integers = options.get("activations", "none").startswith("int")
  assert dots[0] == dots[1] and bool(dots[0]) == integers


def test_steps_start_as_the_papers_say(params):
  w = np.asarray(params["w"], np.float64)
  leaf = _apply("lsq", params, bits=4)["w"]
  expected = 2 * np.abs(w).mean(1, keepdims=True) / np.sqrt(7)
  np.testing.assert_allclose(leaf.scale, expected, rtol=1e-5)
  assert leaf.code_range == (-8, 7)
  whole = _apply("lsq", params, bits=4, per_tensor=True)["w"].scale
  expected = 2 * np.abs(w).mean((1, 2), keepdims=True) / np.sqrt(7)
  np.testing.assert_allclose(whole, expected, rtol=1e-5)
  groups = _apply("lsq", params, bits=3, group=16, symmetric=False)["table"]
  rows = np.asarray(params["table"], np.float64).reshape(40, 4, 16)
  mean, spread = rows.mean(-1), 3 * rows.std(-1)
  least = np.maximum(rows.min(-1), mean - spread)
  most = np.minimum(rows.max(-1), mean + spread)
  np.testing.assert_allclose(groups.scale, (most - least) / 7, rtol=1e-5)
  np.testing.assert_allclose(groups.offset, least, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_served_leaf_holds_the_trained_steps(params, bits):
  fake = _apply("lsq", params, bits=bits, symmetric=bits != 5)
  hard = registry.find("harden")(fake, SPECS)
  for name in ("w", "table"):
    assert isinstance(hard[name], quantized.Quantized) and hard[name].bits == bits
    np.testing.assert_array_equal(hard[name].scale, fake[name].scale)
    step = float(jnp.max(fake[name].scale))
    near = jnp.abs(hard[name].dense() - params[name]) <= 0.51 * step
    assert float(near.mean()) > (0.75 if bits == 2 else 0.9)


def test_masks_and_factors_stay(params):
  pruned = registry.find("magnitude")(params, SPECS, options={"sparsity": 0.5})
  for name in ("qat", "lsq"):
    fake = _apply(name, pruned, where=None, bits=4)
    hard = registry.find("harden")(fake, SPECS)["w"]
    assert isinstance(hard, masked.Masked)
    np.testing.assert_array_equal(hard.mask(), pruned["w"].mask())
    np.testing.assert_array_equal(hard.dense(), fake["w"].dense())
  factors = low_rank.LowRank.create(params["w"][..., :8], params["w"][:, :8])
  fake = _apply("qat", params | {"w": factors}, where=None, bits=4)
  hard = registry.find("harden")(fake, SPECS)["w"]
  assert isinstance(hard.left, quantized.Quantized)
  np.testing.assert_array_equal(hard.dense(), fake["w"].dense())


def test_activations_start_from_calibration(monkeypatch, params):
  seen = []

  def attach(leaf, stats, path, spec, options):
    seen.append((path, options.activation_scale, options.collect))
    return dataclasses.replace(leaf, x_scale=jnp.ones((*leaf.shape[:-2], 1, 1)))

  monkeypatch.setattr(_activation_scales, "attach", attach)
  leaf = _apply("lsq", params, where=None, activations="int8")["w"]
  assert seen == [("w", "mse", ("histogram",))]
  assert set(leaf.trainable_fields) == {"values", "scale", "x_scale"}


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("lsq", {"format": "nf4"}, "format='nf4': lsq trains the steps of integers"),
    ("lsq", {"symmetric": False, "activations": "int8"}, "symmetric"),
    ("qat", {"group": 12}, "group 12 does not divide"),
    ("harden", {}, "start this stage after one of 'qat' or 'lsq'"),
  ],
)
def test_mistakes(params, name, options, message):
  with pytest.raises(errors.InputError, match=message) as error:
    _apply(name, params, **options)
  assert "\n" not in str(error.value)
