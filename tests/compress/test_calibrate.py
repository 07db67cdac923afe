"""Statistics against NumPy in float64, on activations captured by Flax itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from effjax.compress import calibrate
from effjax.core import errors, layers, tree
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.weights import verbs
from effjax.weights import weight as weight_lib
from tests.models.conftest import small_config


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
  assert stats.hessian is None
  # The same through a scan over layers, with Hessians, of these weights alone.
  chosen = calibrate.calibrate(
    *parts, batches, collect=("hessian",), where={"path": "mlp/up"}
  )
  (scanned,) = tree.flatten(chosen).values()
  assert scanned.hessian.shape == (2, 8, 8) and scanned.hessian.dtype == jnp.float32
  np.testing.assert_allclose(scanned.hessian[1], x_TD.T @ x_TD, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(scanned.square_sum[1], stats.square_sum, rtol=1e-5)


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


class Watched(nn.Module):
  """One weight used twice, and experts on rows of theirs, in both forms."""

  @nn.compact
  def __call__(self, x_TD, positions=None, segments=None):
    del positions
    init = nn.initializers.ones
    with weight_lib.token_weights(jnp.asarray(segments, jnp.float32)):
      w = weight_lib.weight(self, "twice", init, (4, 4), axes=("embed", "mlp"))
      verbs.contract(verbs.contract(x_TD, w), w)
      axes = ("experts", "embed", "mlp")
      experts = weight_lib.weight(self, "grouped", init, (3, 4, 2), axes=axes)
      verbs.grouped_contract(x_TD, experts, jnp.array([3, 0, 5]))
      experts = weight_lib.weight(self, "batched", init, (2, 4, 2), axes=axes)
      return verbs.grouped_contract(x_TD.reshape(2, 5, 4), experts)


def test_uses_add_up_and_experts_have_their_own(rng):
  x_TD = rng.standard_normal((10, 4)).astype(np.float32)
  # Row 4 is padding; rows 8 and 9 belong to no group.
  counts_T = (np.arange(10) != 4).astype(np.int32)
  model = Watched()
  batch = {"inputs": x_TD, "segments": counts_T}
  params = model.init(jax.random.key(0), jnp.asarray(x_TD), segments=counts_T)["params"]
  collect = ("moments", "hessian")
  stats = calibrate.calibrate(model, params, [batch, batch], collect=collect)

  def check(stats, *groups):
    """Each group twice, once a batch."""
    stacked = lambda values: np.stack(values) if len(groups) > 1 else values[0]
    np.testing.assert_allclose(stats.count, stacked([2 * len(x) for x in groups]))
    expected = stacked([2 * x.T @ x for x in groups])
    np.testing.assert_allclose(stats.hessian, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      stats.square_sum, np.diagonal(expected, axis1=-2, axis2=-1), rtol=1e-5
    )
    absmax = stacked([np.abs(x).max(axis=0, initial=0) for x in groups])
    np.testing.assert_allclose(stats.absmax, absmax, rtol=1e-6)

  valid = np.delete(x_TD, 4, axis=0)
  check(stats["twice"], np.concatenate([valid, valid @ np.ones((4, 4))]))
  check(stats["grouped"], x_TD[:3], x_TD[:0], x_TD[[3, 5, 6, 7]])
  check(stats["batched"], x_TD[:4], x_TD[5:])
  # A row that does not count may hold anything.
  batch["inputs"][4] = np.nan
  again = calibrate.calibrate(model, params, [batch, batch], collect=collect)
  jax.tree.map(np.testing.assert_array_equal, again, stats)


def test_mistakes(parts, batches):
  with pytest.raises(errors.InputError, match="at least one batch"):
    calibrate.calibrate(*parts, [])
  with pytest.raises(errors.InputError, match="the limit is 100"):
    calibrate.calibrate(*parts, batches, limit_bytes=100)
  with pytest.raises(errors.InputError, match="unknown statistic .* 'hessian'"):
    calibrate.calibrate(*parts, batches, collect=("hessians",))
  with pytest.raises(errors.InputError, match="no selected weight contracts"):
    calibrate.calibrate(*parts, batches, where={"kind": "norm"})


def test_hessians_keep_within_the_limit(parts, batches):
  needed = lambda stats: sum(a.nbytes for a in jax.tree.leaves(stats))
  moments = needed(calibrate.calibrate(*parts, batches))
  collect = {"collect": ("hessian",), "limit_bytes": 2 * moments}
  with pytest.raises(errors.InputError, match="fewer weights at a time with where"):
    calibrate.calibrate(*parts, batches, **collect)
  with pytest.raises(errors.InputError, match="fewer weights at a time with where"):
    calibrate.abstract(*parts, **collect)
  collect["where"] = {"path": "mixer/q"}
  some = calibrate.calibrate(*parts, batches, **collect)
  assert needed(some) <= 2 * moments
  abstract = calibrate.abstract(*parts, **collect)
  shapes = lambda stats: jax.tree.map(lambda a: (a.shape, a.dtype), stats)
  assert shapes(abstract) == shapes(some)


def test_statistics_that_are_not_finite_are_refused(parts, batches):
  model, params = parts
  flat = tree.flatten(params)
  path = "run_0/layer_0/mixer/o"  # After what q, k and v contract in layer 0.
  flat[path] = flat[path].at[0].set(jnp.inf)
  broken = tree.unflatten(flat)
  where = {"path": "mixer/o|mlp/down", "kind": "matrix"}
  with pytest.raises(errors.InputError, match="flows into run_0/.* is not finite"):
    calibrate.calibrate(model, broken, batches, where=where)


def test_every_dispatch_gives_experts_the_same_statistics():
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 8), 0, 64)
  found = []
  for dispatch in ("dense", "dropless"):
    config = small_config(
      num_layers=1,
      mlp_pattern=("moe",),
      mlp_options={"moe": {"num_experts": 3, "hidden_dim": 16, "dispatch": dispatch}},
    )
    model = decoder.Decoder(config)
    params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
    segments = jnp.ones((2, 8), jnp.int32).at[1, 5:].set(0)
    batch = {"inputs": tokens_BL, "segments": segments}
    found.append(calibrate.calibrate(model, params, [batch], collect=("hessian",)))
  dense, dropless = map(tree.flatten, found)
  (path,) = (path for path in dense if path.endswith("mlp/down"))
  counts_E = dense[path].count
  assert counts_E.shape[-1] == 3 and float(counts_E.sum()) % 13 == 0
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    dense[path],
    dropless[path],
  )
