"""Learned rounding against NumPy, against all roundings, and in a small decoder."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from effjax.compress import api as compress
from effjax.compress import blocks, registry
from effjax.compress.quantize import _reconstruct, _soft_rounding, adaround
from effjax.core import errors, layers, specs
from effjax.core import tree as tree_lib
from effjax.models import decoder
from effjax.weights import verbs
from effjax.weights import weight as weight_lib
from effjax.weights.leaves import low_rank, masked, quantized
from tests.models.conftest import small_config

IN, OUT = 10, 3
PATHS = frozenset({"w"})
SPECS = {"w": specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")}


class Linear(nn.Module):
  """A layer that is one product."""

  @nn.compact
  def __call__(self, x, state, positions, segments, keys):
    init = nn.initializers.normal()
    w = weight_lib.weight(self, "w", init, (IN, OUT), axes=("embed", "mlp"))
    return verbs.contract(x, w), None, None


def _linear(seed=0):
  """A weight, correlated inputs `[2, 4, 8, IN]` with padding, and the outputs."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((2, 4, 8, IN)) @ rng.standard_normal((IN, IN))
  w = rng.standard_normal((IN, OUT))
  segments = np.ones((2, 4, 8), np.int32)
  segments[:, :, 6:] = 0
  x, w, segments = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), segments
  stream = blocks.Stream(x, jnp.zeros_like(segments), jnp.asarray(segments))
  return w, stream, jnp.einsum("nbli,io->nblo", x, w)


def _block(options):
  return _reconstruct.block(blocks.Layer(Linear()), SPECS, PATHS, options)


def _rounded(w, stream, targets, **options):
  block = _block(adaround.AdaRoundOptions(**options))
  key = jax.random.key(0)
  params, _ = adaround._rounded("a layer", block, {"w": w}, stream, targets, key)
  return params["w"]


def _error(dense, stream, targets):
  """Mean over tokens and outputs, in float64."""
  is_token = np.asarray(stream.segments_BL) > 0
  x, y = (np.asarray(a, np.float64)[is_token] for a in (stream.x_BLD, targets))
  return np.square(x @ np.asarray(dense, np.float64) - y).mean(axis=0)


def _nearest(w, **options):
  if "format" not in options:
    options = {"bits": 4} | options
  options = {"range": "mse"} | options
  return registry.find("rtn")({"w": w}, SPECS, options=options)["w"]


def test_formulas():
  v = np.linspace(-4, 4, 81)
  expected = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
  h = _soft_rounding.share(jnp.asarray(v))
  np.testing.assert_allclose(h, expected, atol=1e-6)
  assert h[0] == 0 and h[-1] == 1 and h[40] == 0.5
  inside = jnp.linspace(0, 1, 21)
  back = _soft_rounding.share(_soft_rounding.variable(inside))
  np.testing.assert_allclose(back, inside, atol=1e-6)
  for beta in (20.0, 2.0):
    penalty = _soft_rounding.undecided(h, jnp.float32(beta))
    np.testing.assert_allclose(penalty, 1 - np.abs(2 * expected - 1) ** beta, atol=1e-5)
  betas = [
    float(_soft_rounding.annealed(jnp.int32(t), 101, 20 / 101, (20.0, 2.0)))
    for t in (0, 20, 21, 60, 101)
  ]
  np.testing.assert_allclose(
    betas, [20, 20, 20 - 18 / 81, 20 - 40 * 18 / 81, 2], rtol=1e-6
  )


def test_the_penalty_has_a_gradient_where_it_is_smooth():
  """Nothing is undefined at the middle or the ends."""
  slope = jax.vmap(jax.grad(_soft_rounding.undecided), (0, None))
  h = jnp.asarray([0.0, 0.25, 0.5, 0.75, 1.0])
  for beta in (2.0, 7.3, 20.0):
    x = 2 * np.asarray(h) - 1
    expected = -2 * beta * np.sign(x) * np.abs(x) ** (beta - 1)
    np.testing.assert_allclose(slope(h, jnp.float32(beta)), expected, rtol=1e-4)


@pytest.mark.parametrize(
  ("options", "least"),
  [({"bits": 3}, 0.75), ({"format": "fp4", "group": 0}, 0.5)],
  ids=("int", "fp4"),
)
def test_close_to_the_best_of_all_roundings(options, least):
  """A column of a linear block has 2^10 roundings; the best of each is the best."""
  full = adaround.AdaRoundOptions(**options)
  block, fmt = _block(full), full.build()
  shares = []
  for seed in range(6):
    w, stream, targets = _linear(seed)
    matrix = _reconstruct.prepare(block, {"w": w})["w"]
    low, high = (
      np.asarray(fmt.decode(c, matrix.grid)).reshape(IN, OUT)
      for c in (matrix.below, matrix.above)
    )
    assert np.all((low <= w) & (w <= high) | (low == high))
    dense = np.asarray(_rounded(w, stream, targets, **options).dense())
    assert np.all(np.isclose(dense, low) | np.isclose(dense, high))
    best = np.full(OUT, np.inf)
    for ups in itertools.product((False, True), repeat=IN):
      tried = np.where(np.asarray(ups)[:, None], high, low)
      best = np.minimum(best, _error(tried, stream, targets))
    rtn = _nearest(w, **options).dense()
    nearest, found = (_error(d, stream, targets).sum() for d in (rtn, dense))
    assert best.sum() <= found * (1 + 1e-5) and found <= nearest * (1 + 1e-5)
    shares.append((nearest - found) / (nearest - best.sum()))
  # Of all that rounding can gain. With ten weights an output, between values that are
  # far apart, a local minimum may be all that there is to reach.
  assert np.mean(shares) > least


def test_worse_than_the_nearest_is_told_and_not_kept(caplog):
  problem = _linear()
  with caplog.at_level(logging.INFO, logger=adaround.__name__):
    leaf = _rounded(*problem, num_steps=1, learning_rate=100.0)
  jax.tree.map(np.testing.assert_array_equal, leaf, _nearest(problem[0]))
  info, warning = caplog.records
  assert info.args[1] < info.args[3] and info.levelno == logging.INFO
  assert warning.levelno == logging.WARNING
  assert "a layer: the learned rounding is worse" in warning.getMessage()
  np.testing.assert_allclose(
    info.args[1], _error(leaf.dense(), *problem[1:]).mean(), rtol=1e-4
  )


def test_zeros_of_a_mask_stay_and_factors_are_learned_too(rng):
  w, stream, targets = _linear()
  mask = jnp.asarray(rng.random(w.shape) < 0.6)
  leaf = _rounded(masked.Masked.create(w, mask), stream, targets)
  assert isinstance(leaf.values, quantized.Quantized)
  dense = np.asarray(leaf.dense())
  assert np.all(dense[~np.asarray(mask)] == 0) and np.any(dense != 0)
  pruned = jnp.where(mask, w, 0)
  loss = lambda dense: _error(dense, stream, targets).sum()
  assert loss(dense) < loss(_nearest(pruned).dense())
  left, right = rng.standard_normal((IN, 4)), rng.standard_normal((4, OUT))
  thin = low_rank.LowRank.create(*(jnp.asarray(a, jnp.float32) for a in (left, right)))
  targets = jnp.einsum("nbli,io->nblo", stream.x_BLD, thin.dense())
  leaf = _rounded(thin, stream, targets)
  assert isinstance(leaf.left, quantized.Quantized)
  assert loss(leaf.dense()) < loss(_nearest(thin).dense())


def test_fewer_sequences_a_step_are_drawn_by_the_seed():
  problem = _linear()
  first, again = (_rounded(*problem, bits=3, batch_size=2) for _ in range(2))
  np.testing.assert_array_equal(first.codes, again.codes)
  data = jnp.arange(8).reshape(2, 4)
  rows = [_reconstruct._rows(data, jax.random.key(k), 3) for k in range(20)]
  assert all(len(set(map(int, row))) == 3 for row in rows)
  assert set(np.concatenate(rows).tolist()) == set(range(8))
  everything = _reconstruct._rows(data, jax.random.key(0), 8)
  np.testing.assert_array_equal(everything, np.arange(8))


OPTIONS = {"bits": 3, "num_steps": 200}


@pytest.fixture(scope="module")
def small():
  """A decoder of two equal layers, its parameters and text that ends in padding."""
  model = decoder.Decoder(small_config(num_layers=2, pattern=("attention",)))
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 16), 0, 64)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  segments_BL = jnp.ones((2, 16), jnp.int32).at[1, 10:].set(0)
  inputs = jax.random.randint(jax.random.key(2), (2, 2, 16), 0, 64)
  return model, params, [{"inputs": i, "segments": segments_BL} for i in inputs]


def _transform(small, batches=None, **changes):
  model, params, own = small
  technique, tree = registry.find("adaround"), specs.specs(model)
  given = own if batches is None else batches
  return compress.transform(
    technique, model, params, tree, given, options=OPTIONS, **changes
  )


@pytest.fixture(scope="module")
def learned(small):
  """The parameters of `small` afterwards, and what was logged."""
  handler = logging.Handler()
  records = []
  handler.emit = records.append
  log = logging.getLogger(adaround.__name__)
  before = log.level
  log.addHandler(handler)
  log.setLevel(logging.INFO)
  _reconstruct.learned.clear_cache()
  made = _transform(small)[1]
  log.removeHandler(handler)
  log.setLevel(before)
  return made, records


@pytest.fixture(scope="module")
def nearest(small):
  """Its parameters rounded to nearest, on the same grids."""
  model, params, _ = small
  options = {"bits": 3, "range": "mse"}
  return registry.find("rtn")(params, specs.specs(model), options=options)


def _streams(model, params, batch, through):
  """What flows out of each of the first layers."""
  _, flat = layers.unstack(model, params)
  parts = blocks.Blocks(model)
  found = [parts.embed(flat, batch)]
  for k in range(through):
    found.append(blocks.run(parts.layer(k), flat[f"layer_{k}"], found[-1]))
  return found[1:]


def _apart(ours, wanted):
  """Squared errors of tokens: their sum over both axes, and the number of tokens."""
  is_token = np.asarray(wanted.segments_BL) > 0
  off = np.asarray(ours.x_BLD - wanted.x_BLD, np.float64)[is_token]
  return np.square(off).mean(axis=-1).sum(), is_token.sum()


def _mean_apart(pairs):
  total, count = np.sum([_apart(*pair) for pair in pairs], axis=0)
  return total / count


def test_blocks_lose_less_than_with_rounding_to_nearest(small, learned, nearest):
  model, params, batches = small
  made = learned[0]
  assert jax.tree.structure(made) == jax.tree.structure(nearest)
  full, ours, theirs = (
    [_streams(model, tree, batch, 2) for batch in batches]
    for tree in (params, made, nearest)
  )
  at = lambda found, k: [streams[k] for streams in found]
  lost = [
    [_mean_apart(zip(at(tree, k), at(full, k), strict=True)) for tree in (ours, theirs)]
    for k in (0, 1)
  ]
  assert lost[0][0] < 0.6 * lost[0][1] and lost[1][0] < 0.4 * lost[1][1]
  # What the log says is what is: targets are those of the unquantized model, and inputs
  # come through the quantized layer before.
  first, second = (record.args for record in learned[1])
  assert (first[0], second[0]) == ("layer_0", "layer_1")
  np.testing.assert_allclose(first[1], lost[0][1], rtol=1e-3)
  np.testing.assert_allclose((first[3], second[3]), [l[0] for l in lost], rtol=1e-3)
  _, flat = layers.unstack(model, nearest)
  layer = blocks.Blocks(model).layer(1)
  mixed = [blocks.run(layer, flat["layer_1"], stream) for stream in at(ours, 0)]
  np.testing.assert_allclose(
    second[1], _mean_apart(zip(mixed, at(full, 1), strict=True)), rtol=1e-3
  )


def test_codes_are_those_below_or_above(small, learned, nearest):
  model, params, _ = small
  before, nearest = tree_lib.flatten(params), tree_lib.flatten(nearest)
  changed = 0
  for path, leaf in tree_lib.flatten(learned[0]).items():
    if not isinstance(leaf, quantized.Quantized):
      np.testing.assert_array_equal(leaf, before[path])
      continue
    np.testing.assert_array_equal(leaf.scale, nearest[path].scale)
    places = np.asarray(before[path]) / np.asarray(leaf.scale)
    codes = np.asarray(leaf.unpacked())
    low, high = (np.clip(f(places), -3, 3) for f in (np.floor, np.ceil))
    assert np.all((codes == low) | (codes == high))
    changed += np.sum(codes != np.asarray(nearest[path].unpacked()))
  assert changed > 100


def test_equal_layers_share_a_program_and_runs_are_repeatable(small, learned):
  assert _reconstruct.learned._cache_size() == 1
  model, again = _transform(small)
  assert model is small[0]
  jax.tree.map(np.testing.assert_array_equal, again, learned[0])


def test_padding_does_not_matter(small, learned):
  other = [
    b | {"inputs": jnp.where(b["segments"] > 0, b["inputs"], 63 - b["inputs"])}
    for b in small[2]
  ]
  assert bool(jnp.any(other[0]["inputs"] != small[2][0]["inputs"]))
  made = _transform(small, other)[1]
  jax.tree.map(np.testing.assert_array_equal, made, learned[0])


def test_what_is_outside_the_layers_is_rounded_to_nearest(small, caplog):
  model, params, _ = small
  where = {"path": "embed/table"}
  with caplog.at_level(logging.INFO, logger=adaround.__name__):
    made = _transform(small, where=where)[1]
  options = {"bits": 3, "range": "mse"}
  expected = registry.find("rtn")(
    params, specs.specs(model), where=where, options=options
  )
  jax.tree.map(np.testing.assert_array_equal, made, expected)
  (record,) = caplog.records
  assert "rounded to nearest, outside the layers: embed/table" in record.getMessage()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_steps": 0}, "num_steps=0 must be positive"),
    ({"batch_size": 0}, "batch_size=0 must be positive"),
    ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
    ({"beta_end": 0.0}, "beta_end=0.0 must be positive"),
    ({"regularizer": -1.0}, "regularizer=-1.0 must not be negative"),
    ({"seed": -1}, "seed=-1 must not be negative"),
    ({"warmup": 1.0}, "warmup=1.0 must be at least 0 and below 1"),
    ({"bits": 7}, "bits=7 must be one of"),
    ({"range": "max"}, "unknown range"),
    ({"group": 12}, "run_0/layer_0/.*: group 12 does not divide the input axis"),
    (
      {"bits": 8, "activations": "int8", "activation_scale": "mse"},
      "activation_scale='mse': adaround gathers no statistics",
    ),
  ],
)
def test_mistakes(small, options, message):
  model, params, batches = small
  technique = registry.find("adaround")
  args = (model, params, specs.specs(model), batches)
  with pytest.raises(errors.InputError, match=message) as caught:
    technique(*args, options=options)
  assert "\n" not in str(caught.value)


def test_what_it_does_not_take(small, nearest):
  model, params, batches = small
  technique, tree = registry.find("adaround"), specs.specs(model)
  with pytest.raises(errors.InputError, match="runs the model on text: pass batches"):
    technique(model, params, tree)
  with pytest.raises(errors.InputError, match="is already a quantized leaf"):
    technique(model, nearest, tree, batches)
  w, stream, targets = _linear()
  with pytest.raises(errors.InputError, match="a layer puts out what is not finite"):
    _rounded(w.at[0, 0].set(jnp.nan), stream, targets)


def test_options_are_recorded_as_they_ran():
  assert adaround.AdaRoundOptions().bits == 4
  assert adaround.AdaRoundOptions(format="nf4").bits is None
  assert registry.find("adaround").needs_batches
