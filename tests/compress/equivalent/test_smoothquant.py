import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import calibrate
from effjax.compress.equivalent import smoothquant
from effjax.compress.quantize import rtn
from effjax.core import errors, specs
from effjax.core import tree as tree_lib
from effjax.models import decoder
from tests.models.conftest import small_config

NORM, UP = "run_0/layer_0/mlp_norm", "run_0/layer_0/mlp/up"


@pytest.fixture(scope="module")
def small():
  """A model whose norms have channels far larger than others, and small readers."""
  config = small_config(
    num_layers=2,
    pattern=("attention",),
    mlp_pattern=("swiglu", "moe"),
    mixer_options={"attention": {"head_dim": 8, "num_heads": 4, "num_kv_heads": 2}},
    mlp_options={"moe": {"num_experts": 3, "hidden_dim": 32, "num_shared": 1}},
    tie_embeddings=False,
  )
  model = decoder.Decoder(config)
  tokens_BL = jax.random.randint(jax.random.key(0), (4, 12), 0, 64)
  flat = tree_lib.flatten(jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"])
  tree, large = specs.specs(model), jnp.array([3, 17])
  for path, spec in tree_lib.flatten(tree).items():
    if path.endswith("_norm/scale"):
      flat[path] = flat[path].at[..., large].mul(60.0)
    elif (spec.reads or "").endswith("_norm"):
      flat[path] = flat[path].at[..., large, :].divide(60.0)
  params = tree_lib.unflatten(flat)
  stats = calibrate.calibrate(model, params, [{"inputs": tokens_BL}])
  apply = jax.jit(model.apply)
  logits = lambda p: apply({"params": p}, tokens_BL)[0]
  return model, params, tree, stats, logits


@pytest.mark.parametrize("linear", [False, True])
def test_the_function_stays(small, linear):
  _, params, tree, stats, logits = small
  got = smoothquant.TECHNIQUE(params, tree, stats, options={"linear": linear})
  before, after = tree_lib.flatten(params), tree_lib.flatten(got)
  changed = {path for path in before if not np.array_equal(before[path], after[path])}
  assert {f"{NORM}/scale", UP, "final_norm/scale", "head"} <= changed
  assert (UP.replace("up", "down") in changed) == linear
  expected = logits(params)
  limit = 1e-4 * max(1.0, float(jnp.max(jnp.abs(expected))))
  assert float(jnp.max(jnp.abs(logits(got) - expected))) <= limit


@pytest.mark.parametrize("alpha", [0.5, 0.85])
def test_factors_are_those_of_equation_4(small, alpha):
  _, params, tree, stats, _ = small
  got = smoothquant.TECHNIQUE(
    params, tree, stats, where={"path": "mlp"}, options={"alpha": alpha}
  )
  before, after = tree_lib.flatten(params), tree_lib.flatten(got)
  x_max = np.asarray(tree_lib.flatten(stats)[UP].absmax)
  w = np.concatenate([before[UP], before[UP.replace("up", "gate")]], axis=-1)
  s = x_max**alpha / np.abs(w).max(axis=-1) ** (1 - alpha)
  np.testing.assert_allclose(
    before[f"{NORM}/scale"] / after[f"{NORM}/scale"], s, rtol=1e-5
  )
  np.testing.assert_allclose(after[UP], before[UP] * s[..., None], rtol=1e-5)
  np.testing.assert_array_equal(
    after["run_0/layer_0/mixer_norm/scale"], before["run_0/layer_0/mixer_norm/scale"]
  )


def test_factors_of_experts_cover_router_shared_and_all_experts(small):
  _, params, tree, stats, _ = small
  got = smoothquant.TECHNIQUE(params, tree, stats)
  before, after = tree_lib.flatten(params), tree_lib.flatten(got)
  norm, mlp = (f"run_1/layer_0/{name}" for name in ("mlp_norm/scale", "mlp"))
  found = tree_lib.flatten(stats)
  names = ("gate", "up", "router", "shared/gate", "shared/up")
  x_max = np.max([_channels(found[f"{mlp}/{n}"].absmax) for n in names], axis=0)
  w_max = np.max(
    [_channels(np.abs(before[f"{mlp}/{n}"]).max(-1)) for n in names], axis=0
  )
  np.testing.assert_allclose(
    (before[norm] / after[norm])[0], np.sqrt(x_max / w_max), rtol=1e-5
  )


def _channels(values):
  """Largest of all leading axes: layers (one) and experts."""
  return np.asarray(values).reshape(-1, values.shape[-1]).max(axis=0)


def test_channels_that_were_never_seen_keep_their_scale(small):
  _, params, tree, stats, _ = small
  found = tree_lib.flatten(stats)
  silent = jax.tree.map(lambda a: a, found)
  for name in ("up", "gate"):
    path = UP.replace("up", name)
    silent[path] = jax.tree.map(lambda a: a.at[..., 5].set(0.0), found[path])
  got = smoothquant.TECHNIQUE(params, tree, tree_lib.unflatten(silent))
  scale = tree_lib.flatten(got)[f"{NORM}/scale"]
  before = tree_lib.flatten(params)[f"{NORM}/scale"]
  assert float(scale[0, 5]) == float(before[0, 5])
  assert float(scale[0, 6]) != float(before[0, 6])


def test_int8_weights_and_activations_lose_far_less(small):
  _, params, tree, stats, logits = small
  options = {"bits": 8, "activations": "int8"}
  where = {"kind": "matrix", "not_path": "head"}
  expected = logits(params)

  def error(p):
    return float(jnp.mean(jnp.square(logits(p) - expected)))

  plain = error(rtn.TECHNIQUE(params, tree, options=options, where=where))
  smooth = smoothquant.TECHNIQUE(params, tree, stats, where=where)
  smoothed = error(rtn.TECHNIQUE(smooth, tree, options=options, where=where))
  assert smoothed < 0.3 * plain


def test_mistakes(small):
  _, params, tree, stats, _ = small
  with pytest.raises(errors.InputError, match="alpha=1.5 must be between 0 and 1"):
    smoothquant.TECHNIQUE(params, tree, stats, options={"alpha": 1.5})
  with pytest.raises(errors.InputError, match="no statistics of what flows into"):
    smoothquant.TECHNIQUE(params, tree, {})
  with pytest.raises(errors.InputError, match="no selected weight that reads a norm"):
    smoothquant.TECHNIQUE(params, tree, stats, where={"path": "mlp/down"})
  quantized = rtn.TECHNIQUE(params, tree)
  with pytest.raises(errors.InputError, match="the log names what was left out"):
    smoothquant.TECHNIQUE(quantized, tree, stats)
  short = jax.tree.map(lambda a: a[None], stats)
  with pytest.raises(errors.InputError, match="they are of another model"):
    smoothquant.TECHNIQUE(params, tree, short)
