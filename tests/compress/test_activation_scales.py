"""Static scales of activations: from calibration onto leaves, and through a model."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import api, calibrate, registry
from effjax.core import errors, layers, specs
from effjax.core import tree as tree_lib
from effjax.measure import flops
from effjax.models import decoder
from effjax.ops.matmul import histogram
from effjax.train import stages
from effjax.weights.leaves import coded, masked, quantized
from tests.models.conftest import small_config

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
EXPERTS = specs.ParamSpec(axes=("experts", "embed", "mlp"), kind="matrix")
EMBEDDING = specs.ParamSpec(axes=("vocab", "embed"), kind="embedding")
TOP = {"int8": 127, "int4": 7, "fp8": 448}


def _stats(x_STI, count=None, *, whole=True):
  """Statistics of a stack S of inputs, as calibration gives them."""
  x_STI = jnp.asarray(x_STI, jnp.float32)
  tokens = x_STI.shape[1]
  counts = jnp.full(len(x_STI), tokens * 1.0) if count is None else jnp.asarray(count)
  weights = jnp.broadcast_to((counts > 0)[:, None], x_STI.shape[:2]) * 1.0
  x_STI = x_STI * (counts > 0)[:, None, None]
  bins = jnp.stack([histogram.counts(*one) for one in zip(x_STI, weights, strict=True)])
  return calibrate.InputStats(
    jnp.sum(x_STI**2, axis=1),
    jnp.max(jnp.abs(x_STI), axis=1),
    counts,
    hessian=jnp.einsum("sti,stj->sij", x_STI, x_STI),
    histogram=bins if whole else None,
  )


def _apply(technique, w, stats, spec=MATRIX, **options):
  options = {"activations": "int8", "activation_scale": "absmax"} | options
  return registry.find(technique)(
    {"w": w},
    {"w": spec},
    None if stats is None else {"w": stats},
    where={"kind": (spec.kind,)},
    options=options,
  )["w"]


@pytest.mark.parametrize("technique", ["rtn", "gptq", "stochastic"])
@pytest.mark.parametrize("method", histogram.METHODS)
def test_every_rounding_puts_the_scale_on_the_leaf(rng, technique, method):
  w = jnp.asarray(rng.standard_normal((2, 16, 8)), jnp.float32)
  x = rng.standard_normal((2, 64, 16)) * np.array([1, 5])[:, None, None]
  stats = _stats(x)
  options = {"activation_scale": method, "percentile": 99.0}
  leaf = _apply(technique, w, stats, **options)
  assert leaf.x_scale.shape == (2, 1, 1) and leaf.x_scale.dtype == jnp.float32
  expected = np.abs(x).max(axis=(1, 2))
  if method != "absmax":
    expected = histogram.threshold(
      stats.histogram,
      jnp.asarray(expected, jnp.float32),
      method=method,
      kind="int8",
      percentile=99.0,
    )
    assert np.all(expected <= np.abs(x).max(axis=(1, 2)) * (1 + 1e-6))
    assert method == "mse" or np.all(expected < 0.9 * np.abs(x).max(axis=(1, 2)))
  np.testing.assert_allclose(leaf.x_scale[:, 0, 0], expected / 127, rtol=1e-6)
  dynamic = _apply(technique, w, stats, activation_scale="dynamic")
  assert dynamic.x_scale is None
  np.testing.assert_array_equal(dynamic.codes, leaf.codes)


@pytest.mark.parametrize(
  ("kind", "options"),
  [
    ("int8", {}),
    ("int4", {"bits": 4}),
    ("int8", {"bits": 4}),
    ("fp8", {"format": "fp8"}),
    ("fp8", {"format": "fp8", "per_tensor": True}),
  ],
)
def test_the_product_is_that_of_rounded_inputs(rng, kind, options):
  w = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
  x = rng.standard_normal((1, 64, 16))
  stats = jax.tree.map(lambda a: a[0], _stats(x))
  leaf = _apply("rtn", w, stats, activations=kind, **options)
  assert isinstance(leaf, coded.Coded if kind == "fp8" else quantized.Quantized)
  assert leaf.activations == kind and leaf.x_scale.shape == (1, 1)
  y = leaf.contract(jnp.asarray(x[0], jnp.float32))
  places = x[0] / (np.abs(x).max() / TOP[kind])
  if kind == "fp8":
    rounded = np.asarray(jnp.asarray(places, jnp.float32).astype(jnp.float8_e4m3fn))
  else:
    rounded = np.rint(places)
  rounded = rounded.astype(np.float64) * np.abs(x).max() / TOP[kind]
  expected = rounded @ np.asarray(leaf.dense(), np.float64)
  # At most a code or two lie on the other side of a tie.
  np.testing.assert_allclose(y, expected, atol=1e-3 if kind != "int4" else 1e-4)


def test_a_tied_head_has_its_scale(rng):
  w = jnp.asarray(rng.standard_normal((20, 16)), jnp.float32)
  x = rng.standard_normal((1, 64, 16))
  stats = jax.tree.map(lambda a: a[0], _stats(x))
  leaf = _apply("rtn", w, stats, EMBEDDING)
  assert leaf.axis == -1 and leaf.x_scale.shape == (1, 1)
  x = jnp.asarray(x[0], jnp.float32)
  exact = x @ leaf.dense().T
  y = leaf.contract(x, transpose=True)
  assert 0 < float(jnp.max(jnp.abs(y - exact))) < 0.02 * float(jnp.max(jnp.abs(exact)))
  ids = jnp.asarray([[3, 0], [19, 3]])
  np.testing.assert_array_equal(leaf.lookup(ids), leaf.dense()[ids])
  with pytest.raises(
    errors.InputError, match="multiplied along the axis they are held"
  ):
    leaf.contract(w)


def test_an_expert_without_tokens_is_scaled_as_the_others(rng, caplog):
  w = jnp.asarray(rng.standard_normal((3, 16, 8)), jnp.float32)
  x = rng.standard_normal((3, 64, 16)) * np.array([1, 3, 2])[:, None, None]
  stats = _stats(x, [64.0, 64.0, 0.0])
  with caplog.at_level(logging.WARNING):
    leaf = _apply("rtn", w, stats, EXPERTS, activation_scale="mse")
  assert "the other experts: w[2]" in caplog.text
  scale = np.asarray(leaf.x_scale)[:, 0, 0]
  assert scale[2] == scale[1] == scale[:2].max()
  with pytest.raises(errors.InputError, match="w: .*gave it no token, or only zeros"):
    _apply("rtn", w, _stats(x, [0.0, 0.0, 0.0]), EXPERTS)
  with pytest.raises(errors.InputError, match="w: .*gave it no token, or only zeros"):
    _apply("rtn", w, stats)  # Layers are no experts.


def test_mistakes_are_one_line(rng):
  w = jnp.asarray(rng.standard_normal((1, 16, 8)), jnp.float32)
  stats = _stats(rng.standard_normal((1, 8, 16)))
  bare = _stats(rng.standard_normal((1, 8, 16)), whole=False)
  with pytest.raises(errors.InputError, match=r"needs statistics.*\('moments',\)"):
    _apply("rtn", w, None)
  with pytest.raises(errors.InputError, match=r"needs statistics.*\('histogram',\)"):
    _apply("rtn", w, bare, activation_scale="mse")
  assert _apply("rtn", w, bare).x_scale is not None
  with pytest.raises(errors.InputError, match="of another model"):
    _apply("rtn", jnp.concatenate([w, w]), stats)
  low = registry.find("svd")({"w": w}, {"w": MATRIX}, options={"rank": 4})["w"]
  with pytest.raises(errors.InputError, match="w.left: .*of a low-rank one"):
    _apply("rtn", low, stats)
  pruned = masked.Masked.create(w, w > 0)
  with pytest.raises(errors.InputError, match="w is pruned, which multiplies a dense"):
    _apply("rtn", pruned, stats)


@pytest.fixture(scope="module")
def model():
  """Scanned attention layers, then one with experts."""
  config = small_config(
    num_layers=3,
    pattern=("attention",),
    mlp_pattern=("swiglu", "swiglu", "moe"),
    mlp_options={"moe": {"num_experts": 2, "hidden_dim": 32, "router": "sigmoid"}},
  )
  made = decoder.Decoder(config)
  tokens_BL = jax.random.randint(jax.random.key(0), (4, 16), 0, 64)
  return made, jax.jit(made.init)(jax.random.key(1), tokens_BL)["params"], tokens_BL


@pytest.mark.parametrize(
  ("options", "limit"),
  [
    ({"activations": "int8", "activation_scale": "percentile"}, 0.1),
    pytest.param(
      {"activations": "int4", "bits": 4, "activation_scale": "mse"},
      1.0,
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {"format": "fp8", "activations": "fp8", "activation_scale": "absmax"},
      0.2,
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_whole_model(model, options, limit, tmp_path):
  made, params, tokens_BL = model
  tree = specs.specs(made)
  change, batches = registry.find("rtn"), [{"inputs": tokens_BL}]
  _, new = api.transform(change, made, params, tree, batches, options=options)
  run = lambda model, params: jax.jit(model.apply)({"params": params}, tokens_BL)[0]
  expected, got = run(made, params), run(made, new)
  apart = jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)
  assert 0 < float(apart) < limit
  # Stacks and experts have a scale each.
  shapes = {
    leaf.x_scale.shape
    for path, leaf in tree_lib.flatten(new).items()
    if tree_lib.flatten(tree)[path].kind == "matrix"
  }
  assert {(2, 1, 1), (1, 2, 1, 1)} <= shapes
  planned = api.shapes(change, made, params, tree, options=options)[1]
  assert jax.tree.structure(planned) == jax.tree.structure(new)
  # Layer by layer, and saved and restored.
  unrolled, flat = layers.unstack(made, new)
  np.testing.assert_allclose(run(unrolled, flat), got, atol=1e-4)
  stages.save_stage(tmp_path / "stage", made, new, tree, None)
  loaded = stages.load_stage(tmp_path / "stage")
  assert jax.tree.structure(loaded.params) == jax.tree.structure(new)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, new)


def test_calibration_counts_every_input_of_every_token(model):
  made, params, tokens_BL = model
  segments_BL = (jnp.arange(16)[None] < jnp.asarray([16, 3, 0, 9])[:, None]).astype(int)
  batch = {"inputs": tokens_BL, "segments": segments_BL}
  gather = lambda batches: calibrate.calibrate(
    made, params, batches, collect=("histogram",), where={"path": "mlp"}
  )
  once, twice = (tree_lib.flatten(gather([batch] * n)) for n in (1, 2))
  assert {"run_0/layer_0/mlp/up", "run_1/layer_0/mlp/experts/up"} & set(once)
  for path, stats in once.items():
    inputs = stats.absmax.shape[-1]
    assert stats.histogram.shape == (*stats.count.shape, histogram.BINS)
    np.testing.assert_array_equal(stats.histogram.sum(-1), stats.count * inputs)
    np.testing.assert_array_equal(twice[path].histogram, 2 * stats.histogram)
    # The largest magnitude lies in the last bin that is not empty.
    largest = np.max(stats.absmax, axis=-1)
    filled = np.asarray(stats.histogram) > 0
    last = histogram.BINS - 1 - np.argmax(filled[..., ::-1], axis=-1)
    some = largest > 0
    np.testing.assert_array_equal(
      np.asarray(histogram.bins_of(jnp.asarray(largest)))[some], last[some]
    )


@pytest.mark.parametrize("options", [{"activations": "int8"}, {"format": "fp8"}])
def test_operations_are_counted_as_those_of_plain_weights(model, options):
  made, params, _ = model
  options = {"activations": "fp8", "activation_scale": "dynamic"} | options
  new = registry.find("rtn")(params, specs.specs(made), options=options)
  assert flops.per_token(made, new, 16) == flops.per_token(made, params, 16)
