"""Statistics against NumPy in float64, on activations captured by Flax itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import calibrate
from effjax.core import errors, layers, tree
from effjax.models import config as model_config
from effjax.models import decoder


@pytest.fixture(scope="module")
def parts():
  config = model_config.DecoderConfig(
    vocab_size=19,
    embed_dim=8,
    num_layers=2,
    mixer_options={"attention": {"num_heads": 2, "head_dim": 4}},
    max_len=16,
  )
  model = decoder.Decoder(config)
  params = model.init(jax.random.key(0), *model.example_inputs())["params"]
  return model, params


@pytest.fixture(scope="module")
def batches():
  rng = np.random.default_rng(0)
  segments = np.array([[1] * 6, [1] * 2 + [2] * 2 + [0] * 2], np.int32)
  return [
    {
      "inputs": rng.integers(0, 19, (2, 6)).astype(np.int32),
      "segments": segments,
      "targets": np.zeros((2, 6), np.int32),
    }
    for _ in range(3)
  ]


def test_statistics_of_an_mlp_are_those_of_its_norm(parts, batches):
  """The inputs of `up` are the outputs of `mlp_norm`, which Flax can capture."""
  model, params = layers.unstack(*parts)
  seen = []
  for batch in batches:
    _, found = model.apply(
      {"params": params},
      jnp.asarray(batch["inputs"]),
      segments=jnp.asarray(batch["segments"]),
      capture_intermediates=lambda module, _: module.name == "mlp_norm",
      mutable=["intermediates"],
    )
    x_BLD = found["intermediates"]["layer_1"]["mlp_norm"]["__call__"][0]
    seen.append(np.asarray(x_BLD, np.float64)[batch["segments"] > 0])
  x_TD = np.concatenate(seen)
  stats = tree.flatten(calibrate.calibrate(model, params, batches))["layer_1/mlp/up"]
  assert float(stats.count) == len(x_TD) == 30
  np.testing.assert_allclose(stats.square_sum, (x_TD**2).sum(axis=0), rtol=1e-5)
  np.testing.assert_allclose(stats.mean_square, (x_TD**2).mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(stats.absmax, np.abs(x_TD).max(axis=0), rtol=1e-6)


def test_scanned_and_unstacked_agree(parts, batches):
  scanned = calibrate.calibrate(*parts, batches)
  model, params = layers.unstack(*parts)
  apart = tree.flatten(calibrate.calibrate(model, params, batches))
  stacked = tree.flatten(scanned)
  assert "run_0/layer_0/mlp/down" in stacked
  for k in range(2):
    for name in ("mlp/down", "mixer/q", "mixer/o"):
      a, b = stacked[f"run_0/layer_0/{name}"], apart[f"layer_{k}/{name}"]
      jax.tree.map(
        lambda x, y, k=k: np.testing.assert_allclose(x[k], y, rtol=1e-5), a, b
      )
  # The tied head contracts the embedding; norms contract nothing.
  assert "embed/table" in stacked
  assert "final_norm/scale" not in stacked


def test_order_of_batches_does_not_matter(parts, batches):
  a = calibrate.calibrate(*parts, batches)
  b = calibrate.calibrate(*parts, batches[::-1])
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def test_mistakes(parts, batches):
  with pytest.raises(errors.InputError, match="at least one batch"):
    calibrate.calibrate(*parts, [])
  with pytest.raises(errors.InputError, match="the limit is 100"):
    calibrate.calibrate(*parts, batches, limit_bytes=100)
