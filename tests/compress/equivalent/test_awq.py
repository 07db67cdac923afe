import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import blocks, calibrate
from effjax.compress.equivalent import _search, awq
from effjax.compress.quantize import rtn
from effjax.core import errors, layers, specs
from effjax.core import tree as tree_lib
from effjax.models import decoder
from tests.models.conftest import small_config

OUTLIERS = jnp.array([3, 17])


def _model(**changes):
  values = {
    "num_layers": 2,
    "pattern": ("attention",),
    "mixer_options": {"attention": {"head_dim": 8, "num_heads": 4, "num_kv_heads": 2}},
    "mlp_options": {"swiglu": {"hidden_dim": 64}},
  }
  model = decoder.Decoder(small_config(**(values | changes)))
  tokens_BL = jax.random.randint(jax.random.key(0), (4, 12), 0, 64)
  flat = tree_lib.flatten(jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"])
  for path in flat:
    if path.endswith("_norm/scale"):
      flat[path] = flat[path].at[..., OUTLIERS].set(30.0)
  return model, tree_lib.unflatten(flat), specs.specs(model), tokens_BL


@pytest.fixture(scope="module")
def small():
  """Two equal layers, scanned."""
  return _model()


def _apply(model):
  apply = jax.jit(model.apply)
  return lambda params, tokens_BL: apply({"params": params}, tokens_BL)[0]


def _awq(small, **kwargs):
  model, params, tree, tokens_BL = small
  got = awq.TECHNIQUE(model, params, tree, [{"inputs": tokens_BL}], **kwargs)
  assert got[0] is model
  assert jax.tree.structure(got[1]) == jax.tree.structure(params)
  return got[1]


def test_scales_alone_leave_the_function(small):
  model, params, _, tokens_BL = small
  got = _awq(small, options={"clip": False})
  changed = {
    path.rpartition("layer_0/")[2]
    for path, leaf in tree_lib.flatten(got).items()
    if not np.array_equal(leaf, tree_lib.flatten(params)[path])
  }
  pairs = {"mixer_norm/scale", "mlp_norm/scale"}
  pairs |= {f"mixer/{name}" for name in "qkvo"}
  assert changed == pairs | {f"mlp/{name}" for name in ("gate", "up", "down")}
  expected = _apply(model)(params, tokens_BL)
  limit = 1e-4 * max(1.0, float(jnp.max(jnp.abs(expected))))
  assert float(jnp.max(jnp.abs(_apply(model)(got, tokens_BL) - expected))) <= limit


def test_other_mixers_and_experts_keep_their_function_and_structure():
  built = _model(
    pattern=("linear_attention",),
    mixer_options={"linear_attention": {"head_dim": 8, "chunk": 4}},
    mlp="moe",
    mlp_options={"moe": {"num_experts": 3, "hidden_dim": 32, "dispatch": "dense"}},
  )
  model, params, _, tokens_BL = built
  got = _awq(built, options={"clip": False, "num_grid": 3})
  expected = _apply(model)(params, tokens_BL)
  limit = 1e-4 * max(1.0, float(jnp.max(jnp.abs(expected))))
  assert float(jnp.max(jnp.abs(_apply(model)(got, tokens_BL) - expected))) <= limit
  path = "run_0/layer_0/mlp/down"
  moved = np.asarray(tree_lib.flatten(got)[path] / tree_lib.flatten(params)[path])
  factors = moved[..., 0]  # of each layer, expert and hidden unit
  np.testing.assert_allclose(
    moved, np.broadcast_to(factors[..., None], moved.shape), rtol=1e-5
  )
  assert not np.array_equal(factors[0, 0], factors[0, 1])


# The MLP half of a layer in NumPy, whose attention adds nothing.


def _silent(small):
  model, params, tree, tokens_BL = small
  flat = tree_lib.flatten(params)
  flat["run_0/layer_0/mixer/o"] *= 0
  return model, tree_lib.unflatten(flat), tree, tokens_BL


def _block(x, scale, gate, up, down):
  h = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
  g = h @ gate
  hidden = g / (1 + np.exp(-g)) * (h @ up)
  return h, hidden, x + hidden @ down


def _int4(w, group):
  x = w.reshape(-1, group, w.shape[-1])
  step = np.abs(x).max(1, keepdims=True) / 7
  return (np.clip(np.round(x / step), -7, 7) * step).reshape(w.shape)


def _best_scales(inputs, error):
  """The scales of least error, of `error(rounding)`, and their exponent's number."""
  mean, tried = np.abs(inputs).mean(0), []
  for i in range(20):
    s = np.maximum(mean ** (i / 20), 1e-4)
    s /= np.sqrt(s.max() * s.min())
    tried.append((error(lambda w, s=s[:, None]: _int4(w * s, 32) / s), i, s))
  return min(tried, key=lambda t: t[:2])[1:]


def _naive(x, scale, gate, up, down):
  """Scales of the norm's channels and of the hidden ones, and the block's output."""
  h, hidden, y = _block(x, scale, gate, up, down)

  def error(*matrices):
    return np.mean((_block(x, scale, *matrices)[2] - y) ** 2)

  _, s_norm = _best_scales(h, lambda r: error(r(gate), r(up), down))
  step, s_up = _best_scales(hidden, lambda r: error(gate, up, r(down)))
  assert step > 0
  return s_norm, s_up, y


def test_the_search_is_that_of_a_plain_loop(small):
  silent = _silent(small)
  where = {"path": "mlp/", "kind": "matrix"}
  got = tree_lib.flatten(_awq(silent, options={"clip": False}, where=where))
  flat = {k: np.asarray(v, np.float64) for k, v in tree_lib.flatten(silent[1]).items()}
  x = flat["embed/table"][np.asarray(silent[3]).ravel()]
  names = ("mlp_norm/scale", "mlp/gate", "mlp/up", "mlp/down")
  for k in range(2):
    scale, gate, up, down = (flat[f"run_0/layer_0/{name}"][k] for name in names)
    s_norm, s_up, x = _naive(x, scale, gate, up, down)
    after = {name: np.asarray(got[f"run_0/layer_0/{name}"][k]) for name in names}
    np.testing.assert_allclose(after["mlp_norm/scale"], scale / s_norm, rtol=1e-4)
    np.testing.assert_allclose(after["mlp/down"], down * s_up[:, None], rtol=1e-4)
    up = up * s_norm[:, None] / s_up[None]
    np.testing.assert_allclose(after["mlp/up"], up, rtol=1e-4)


@pytest.mark.parametrize(
  ("bits", "path"),
  [
    (4, "mixer/[qkv]$"),
    (4, "mixer/o$"),
    (4, "mlp/(gate|up)$"),
    (4, "mlp/down"),
    (3, "mlp/(gate|up)$"),
    (3, "mlp/down"),
  ],
)
def test_rounding_after_it_is_never_worse_for_a_pair(small, bits, path):
  model, params, tree, tokens_BL = small
  options = {"bits": bits, "group": 32}
  where = {"path": path}
  scaled = _awq(small, options=options | {"clip": False}, where=where)
  unrolled, expected = layers.unstack(model, params)
  parts = blocks.Blocks(model)

  def error(p):
    """Of the first layer, which alone is given what it was searched with."""
    quantized = rtn.TECHNIQUE(p, tree, options=options, where=where)
    flat = layers.unstack(model, quantized)[1]
    stream = parts.embed(expected, {"inputs": tokens_BL})
    y, got = (
      blocks.run(parts.layer(0), q["layer_0"], stream).x_BLD for q in (expected, flat)
    )
    return float(jnp.mean(jnp.square(got - y)))

  plain, after = error(params), error(scaled)
  assert plain > 0 and after <= plain * (1 + 1e-4)
  if path.startswith("mlp/("):
    assert after < 0.8 * plain  # what outlier channels cost


def test_clipping_is_that_of_a_plain_loop(rng):
  to = awq.AWQOptions(bits=3, group=8).rounding()
  x, w = rng.normal(size=(40, 16)), rng.standard_t(3, size=(16, 5))
  got = _search.clipped(
    *(jnp.asarray(a, jnp.float32) for a in (w, x.T @ x, np.ones(16))), to
  )
  expected = w.copy()
  for out in range(5):
    for rows in (slice(0, 8), slice(8, 16)):
      group, inputs, least = w[rows, out], x[:, rows], np.inf
      for i in range(10):
        bound = np.abs(group).max() * (1 - i / 20)
        kept = np.clip(group, -bound, bound)
        step = np.abs(kept).max() / 3
        q = np.clip(np.round(kept / step), -3, 3) * step
        error = np.mean((inputs @ q - inputs @ group) ** 2)
        if error < least:
          least, expected[rows, out] = error, kept
  assert not np.array_equal(expected, w)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_what_is_clipped(small):
  _, params, _, _ = small
  scaled = tree_lib.flatten(_awq(small, options={"clip": False}))
  options = {"clip_skip": "mlp/down"}
  got = tree_lib.flatten(_awq(small, options=options))
  changed = {
    path.removeprefix("run_0/layer_0/")
    for path in scaled
    if not np.array_equal(scaled[path], got[path])
  }
  assert changed == {"mixer/v", "mixer/o", "mlp/gate", "mlp/up"}
  for path, leaf in got.items():
    assert bool(jnp.all(jnp.abs(leaf) <= jnp.abs(scaled[path]) * (1 + 1e-6)))


def test_clipping_after_scaling_is_given_scaled_inputs(small):
  model, params, tree, tokens_BL = small
  where = {"path": "mlp/down"}
  scaled = _awq(small, options={"clip": False}, where=where)
  got = tree_lib.flatten(_awq(small, where=where))
  stats = calibrate.calibrate(
    model, scaled, [{"inputs": tokens_BL}], collect=("hessian",), where=where
  )
  path = "run_0/layer_0/mlp/down"
  w, hessian = tree_lib.flatten(scaled)[path], tree_lib.flatten(stats)[path].hessian
  expected = _search.clipped(
    w, hessian, jnp.ones(w.shape[:-1]), awq.AWQOptions().rounding()
  )
  # A tie within rounding may fall the other way.
  same = np.isclose(got[path], expected, rtol=1e-5)
  assert same.mean() > 0.99 and not np.array_equal(expected, w)


def test_magnitudes_are_means_over_valid_tokens(small):
  model, params, _, tokens_BL = small
  segments = jnp.ones((4, 12), jnp.int32).at[:, 7:].set(0)
  stats = tree_lib.flatten(
    calibrate.calibrate(
      model,
      params,
      [{"inputs": tokens_BL, "segments": segments}],
      collect=("moments", "magnitudes"),
      where={"path": "mixer/q"},
    )
  )["run_0/layer_0/mixer/q"]
  table = np.asarray(params["embed"]["table"])[np.asarray(tokens_BL)[:, :7]]
  x = table / np.sqrt((table**2).mean(-1, keepdims=True) + 1e-5)
  x = x * np.asarray(params["run_0"]["layer_0"]["mixer_norm"]["scale"][0])
  np.testing.assert_allclose(stats.abs_sum[0], np.abs(x).sum((0, 1)), rtol=1e-4)
  assert float(stats.count[0]) == 4 * 7


def test_padding_does_not_matter(small):
  model, params, tree, tokens_BL = small
  segments = jnp.ones((4, 12), jnp.int32).at[:, 7:].set(0)
  results = [
    awq.TECHNIQUE(
      model,
      params,
      tree,
      [{"inputs": tokens_BL.at[:, 7:].set(token), "segments": segments}],
    )[1]
    for token in (1, 9)
  ]
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_compiled_once_for_equal_layers(small):
  before = _search.search._cache_size(), _search.clipped._cache_size()
  options = {"bits": 5, "num_grid": 2}
  _awq(small, options=options, where={"path": "mlp/", "kind": "matrix"})
  after = _search.search._cache_size(), _search.clipped._cache_size()
  # Two pairs; clipped are the shapes of gate with up, and of down.
  assert (after[0] - before[0], after[1] - before[1]) == (2, 2)


def test_default_format_and_mistakes(small):
  model, params, tree, tokens_BL = small
  options = awq.AWQOptions()
  assert (options.bits, options.group) == (4, 32)
  assert (awq.AWQOptions(bits=3).group, awq.AWQOptions(format="nf4").bits) == (0, None)
  for given, message in (
    ({"num_grid": 0}, "num_grid=0 must be positive"),
    ({"clip_skip": "("}, "is not a regular expression"),
    ({"bits": 4, "group": 20}, "layer_0/mixer/k: group 20 does not divide"),
  ):
    with pytest.raises(errors.InputError, match=message):
      _awq(small, options=given)
  with pytest.raises(errors.InputError, match="none is selected"):
    _awq(small, where={"path": "embed/table"})
  with pytest.raises(errors.InputError, match="kind 'norm'"):
    _awq(small, where={"path": "mlp"})
  with pytest.raises(errors.InputError, match="pass batches"):
    awq.TECHNIQUE(model, params, tree)
  quantized = rtn.TECHNIQUE(params, tree)
  with pytest.raises(errors.InputError, match="already a quantized leaf"):
    _awq((model, quantized, tree, tokens_BL))
