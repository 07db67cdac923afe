"""Scores against their formulas in NumPy and against derivatives of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import api as compress
from effjax.compress import calibrate, derivatives, registry
from effjax.core import errors, specs
from effjax.core import tree as tree_lib
from effjax.models import decoder
from effjax.weights.leaves import masked
from tests.compress.hessian_problems import problem
from tests.compress.prune.test_sparsegpt import prune
from tests.models.conftest import small_config


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_equals_numpy(pattern):
  w, h = problem(0, 32, 12)
  leaf = prune("wanda", jnp.asarray(w, jnp.float32), jnp.asarray(h), pattern=pattern)
  norms = np.sqrt(np.diag(h))  # ||X_i||, H being X^T X
  scores = np.abs(w) * norms[:, None]
  group = 32 if pattern == "unstructured" else 4
  expected = np.ones(w.shape, bool)
  for o in range(12):
    for start in range(0, 32, group):
      lost = np.argsort(scores[start : start + group, o])[: group // 2]
      expected[start + lost, o] = False
  np.testing.assert_array_equal(leaf.mask(), expected)
  np.testing.assert_array_equal(
    leaf.dense(), np.where(expected, w, 0).astype("float32")
  )


def test_wanda_compares_where_the_pattern_allows():
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(0, 32, 12))
  mask = np.asarray(prune("wanda", w, h, pattern="rows").mask())
  scores = np.abs(w) * np.sqrt(np.diag(h))[:, None]
  kept = mask.any(axis=1)
  assert kept.sum() == 16 and (mask.all(axis=1) == kept).all()
  assert scores.mean(axis=1)[kept].min() > scores.mean(axis=1)[~kept].max()
  one_threshold = np.asarray(prune("wanda", w, h, budget="global").mask())
  assert scores[one_threshold].min() > scores[~one_threshold].max()


def test_wanda_without_statistics():
  w = jnp.ones((4, 4))
  about = {"w": specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")}
  with pytest.raises(errors.InputError, match="w: wanda has no statistics of it"):
    registry.find("wanda")({"w": w}, about)
  wrong = calibrate.InputStats(jnp.ones(5), jnp.ones(5), jnp.ones(()))
  with pytest.raises(errors.InputError, match="they are of another model"):
    registry.find("wanda")({"w": w}, about, {"w": wrong})


def test_random_goes_by_seed_and_path():
  about = dict.fromkeys("ab", specs.ParamSpec(axes=("embed", "mlp"), kind="matrix"))
  params = {"a": jnp.ones((16, 16)), "b": jnp.ones((16, 16))}
  run = lambda **options: registry.find("random")(params, about, options=options)
  first, again, other = run(), run(), run(seed=1)
  np.testing.assert_array_equal(first["a"].mask(), again["a"].mask())
  assert bool((first["a"].mask() != first["b"].mask()).any())
  assert bool((first["a"].mask() != other["a"].mask()).any())
  assert int(first["a"].mask().sum()) == 128


@pytest.fixture(scope="module")
def small():
  model = decoder.Decoder(small_config(num_layers=2))
  tokens_BL = jax.random.randint(jax.random.key(0), (4, 12), 0, 64)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  return model, params, specs.specs(model), [{"inputs": tokens_BL}]


def _mean_loss(model, params, batch):
  full = derivatives.with_targets(batch)
  logits = model.apply({"params": params}, full["inputs"])[0]
  logs = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(logs, full["targets"][..., None], axis=-1)[..., 0]
  return jnp.sum(nll * full["weights"]) / jnp.sum(full["weights"])


def test_taylor_and_fisher_go_by_derivatives_of_the_loss(small):
  model, params, tree, batches = small
  grad = jax.jit(jax.grad(lambda p, b: _mean_loss(model, p, b)))
  flat = tree_lib.flatten(params)
  rows = [{"inputs": batches[0]["inputs"][i : i + 1]} for i in range(4)]
  whole = tree_lib.flatten(grad(params, batches[0]))
  each = [tree_lib.flatten(grad(params, row)) for row in rows]
  scores = {
    "taylor": lambda path: np.abs(whole[path] * flat[path]),
    "fisher": lambda path: sum(np.square(g[path]) for g in each) * flat[path] ** 2,
  }
  for name, score in scores.items():
    technique = registry.find(name)
    same, new = compress.transform(technique, model, params, tree, batches)
    assert same is model
    path = "run_0/layer_0/mlp/up"
    kept, values = np.asarray(tree_lib.flatten(new)[path].mask()), score(path)
    for layer in range(len(kept)):
      assert kept[layer].sum() == kept[layer].size - round(0.5 * kept[layer].size)
      of_kept, of_lost = values[layer][kept[layer]], values[layer][~kept[layer]]
      # Rounding decides only between scores that are all but equal.
      assert of_kept.min() > of_lost.max() * (1 - 1e-3)


def test_gradients_are_those_of_the_mean_over_all_batches(small):
  model, params, _, batches = small
  halves = [{"inputs": batches[0]["inputs"][i : i + 2]} for i in (0, 2)]
  path = "run_0/layer_0/mlp/up"
  got = derivatives.gradients(model, params, halves, [path])[path]
  expected = jax.jit(jax.grad(lambda p: _mean_loss(model, p, batches[0])))(params)
  expected = tree_lib.flatten(expected)[path]
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


def test_obd_prunes_by_the_gauss_newton_diagonal(small):
  model, params, tree, batches = small
  options = {"probes": 2, "seed": 3}
  _, new = compress.transform(
    registry.find("obd"), model, params, tree, batches, options=options
  )
  path = "run_0/layer_0/mlp/up"
  leaf = tree_lib.flatten(new)[path]
  assert isinstance(leaf, masked.Masked)
  kept = np.asarray(leaf.mask())
  paths = [p for p, x in tree_lib.flatten(new).items() if hasattr(x, "mask")]
  diagonal = derivatives.fisher(model, params, batches, paths, probes=2, seed=3)[path]
  scores = np.asarray(diagonal * tree_lib.flatten(params)[path] ** 2)
  for layer in range(len(kept)):
    assert scores[layer][kept[layer]].min() >= scores[layer][~kept[layer]].max()


def test_pruning_by_derivatives_needs_batches_and_a_decoder(small):
  model, params, tree, _ = small
  with pytest.raises(errors.InputError, match="at least one batch"):
    compress.transform(registry.find("obd"), model, params, tree, [])
  with pytest.raises(errors.InputError, match="probes=0 must be positive"):
    registry.find("obd").options({"probes": 0})
