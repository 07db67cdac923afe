"""SparseGPT against the paper's algorithm in NumPy float64, and against Wanda.

Letters: I inputs, O outputs; the paper's matrices are W `[O, I]`.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import calibrate, hessians, registry
from effjax.compress.prune import sparsegpt
from effjax.core import errors, specs
from effjax.weights.leaves import masked
from tests.compress.hessian_problems import problem, stats_of

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
EMBEDDING = specs.ParamSpec(axes=("vocab", "embed"), kind="embedding")
DAMPING = 0.01


def prune(name, w, hessian, spec=MATRIX, **options):
  """The leaf that a transform makes of one matrix."""
  where = {"kind": (spec.kind,)}
  stats = {"w": stats_of(hessian)}
  technique = registry.find(name)
  return technique({"w": w}, {"w": spec}, stats, where=where, options=options)["w"]


def _paper(w_io, h, *, sparsity=0.5, block=8, n_of_m=None):
  """Algorithm 1; weights `[O, I]` with zeros, and their mask."""
  w, in_dim = w_io.T.copy(), len(w_io)
  h = h + DAMPING * np.mean(np.diag(h)) * np.eye(in_dim)
  inverse = np.linalg.cholesky(np.linalg.inv(h)).T
  mask = np.ones(w.shape, bool)
  for i in range(0, in_dim, block):
    errors_OB = np.zeros((len(w), block))
    if n_of_m is None:
      cost = w[:, i : i + block] ** 2 / np.diag(inverse)[i : i + block] ** 2
      lost = np.argsort(cost, axis=None, kind="stable")[: round(sparsity * cost.size)]
      chosen = mask[:, i : i + block].copy()
      chosen.reshape(-1)[lost] = False
      mask[:, i : i + block] = chosen
    for j in range(i, i + block):
      if n_of_m is not None and j % n_of_m[1] == 0:
        n, m = n_of_m
        cost = w[:, j : j + m] ** 2 / np.diag(inverse)[j : j + m] ** 2
        for o, lost in enumerate(np.argsort(cost, axis=1)[:, : m - n]):
          mask[o, j + lost] = False
      error = np.where(mask[:, j], 0, w[:, j]) / inverse[j, j]
      w[:, j] = np.where(mask[:, j], w[:, j], 0)
      errors_OB[:, j - i] = error
      w[:, j + 1 : i + block] -= np.outer(error, inverse[j, j + 1 : i + block])
    w[:, i + block :] -= errors_OB @ inverse[i : i + block, i + block :]
  return w.T, mask.T


CASES = {
  "half": {"sparsity": 0.5},
  "most": {"sparsity": 0.8, "block": 16},
  "2:4": {"n_of_m": (2, 4)},
  "1:4": {"n_of_m": (1, 4)},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_paper(name):
  case = CASES[name]
  w, h = problem()
  expected, mask = _paper(w, h, **case)
  options = {"block": case.get("block", 8)}
  if "n_of_m" in case:
    options["pattern"] = name
  else:
    options["sparsity"] = case["sparsity"]
  with jax.enable_x64(True):
    leaf = prune("sparsegpt", jnp.asarray(w), jnp.asarray(h), **options)
    got, kept = np.asarray(leaf.dense()), np.asarray(leaf.mask())
  np.testing.assert_array_equal(kept, mask)
  np.testing.assert_allclose(got, expected, atol=1e-10)
  single = prune(
    "sparsegpt", jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32), **options
  )
  assert (np.asarray(single.mask()) == mask).mean() >= 0.995
  agree = np.asarray(single.mask()) == mask
  off = np.abs(np.asarray(single.dense()) - expected)[agree.all(axis=1)]
  assert np.median(off) < 1e-5


def test_it_loses_less_than_wanda_and_that_less_than_magnitude():
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(1, 64, 48))
  losses = []
  for name in ("sparsegpt", "wanda", "magnitude"):
    error = np.asarray(prune(name, w, h).dense() - w, np.float64)
    losses.append(np.sum(error * (np.asarray(h, np.float64) @ error)))
  assert losses[0] < 0.7 * losses[1] and losses[1] < losses[2]


def test_the_loss_reported_is_that_of_the_damped_hessian():
  w, h = problem(2)
  options = sparsegpt.SparseGPTOptions(block=8)
  with jax.enable_x64(True):
    values, _, report = sparsegpt.prune_matrix(
      jnp.asarray(w), jnp.asarray(h), jnp.asarray(True), 0.5, options=options
    )
    damped = h + DAMPING * np.mean(np.diag(h)) * np.eye(len(h))
    error = np.asarray(values) - w
    np.testing.assert_allclose(report.loss, np.sum(error * (damped @ error)))


def test_stacked_matrices_and_an_embedding_are_each_their_own():
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(3, stack=(2, 3)))
  spec = specs.ParamSpec(
    axes=("embed", "mlp"), kind="matrix", stack=("layers", "experts")
  )
  all_of_them = prune("sparsegpt", w, h, spec, block=8)
  for at in np.ndindex(2, 3):
    one = prune("sparsegpt", w[at], h[at], block=8)
    np.testing.assert_array_equal(all_of_them.mask()[at], one.mask())
    np.testing.assert_allclose(all_of_them.dense()[at], one.dense(), atol=1e-5)
  turned = prune("sparsegpt", w[0, 0].T, h[0, 0], EMBEDDING, block=8)
  expected = prune("sparsegpt", w[0, 0], h[0, 0], block=8).dense()
  np.testing.assert_allclose(turned.dense().T, expected, atol=1e-6)


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_named(caplog):
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(4, stack=(2,)))
  h = h.at[1].set(0)
  stats = stats_of(h)
  stats = {"w": calibrate.InputStats(*_with_count(stats, jnp.array([100.0, 0.0])))}
  with caplog.at_level(logging.WARNING, logger=hessians.__name__):
    leaf = registry.find("sparsegpt")(
      {"w": w}, {"w": MATRIX}, stats, options={"block": 64}
    )["w"]
  assert "sparsegpt: no token seen, pruned by magnitude: w[1]" in caplog.text
  one = prune("magnitude", w[1], h[1])
  np.testing.assert_array_equal(leaf.mask()[1], one.mask())
  np.testing.assert_array_equal(leaf.dense()[1], one.dense())


def _with_count(stats, count):
  return stats.square_sum, stats.absmax, count, stats.hessian


def test_uneven_budgets_reach_every_matrix():
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(5, 32, 64))
  params = {"a": w, "b": w[:, :8]}
  about = dict.fromkeys("ab", MATRIX)
  stats = dict.fromkeys("ab", stats_of(h))
  out = registry.find("sparsegpt")(
    params, about, stats, options={"sparsity": 0.8, "budget": "erk", "block": 32}
  )
  density = {n: float(np.mean(np.asarray(out[n].mask()))) for n in "ab"}
  ratio = (32 + 64) / (32 * 64) / ((32 + 8) / (32 * 8))
  assert density["a"] / density["b"] == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"pattern": "rows"}, "takes the patterns unstructured and N:M, not rows"),
    ({"budget": "global"}, "budget='global' compares scores before"),
    ({"damping": -1.0}, "must not be negative"),
    ({"within": "output"}, "leave within out"),
    ({"pattern": "2:5"}, "w: pattern 2:5 needs inputs in whole groups of 5, not 64"),
  ],
)
def test_bad_options(options, message):
  w, h = (jnp.asarray(a, jnp.float32) for a in problem())
  with pytest.raises(errors.InputError, match=message):
    prune("sparsegpt", w, h, **options)


def test_nothing_left_is_refused():
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(0, 4, 2))
  with pytest.raises(errors.InputError, match="nothing would be left of w; ask for"):
    prune("sparsegpt", w, h, sparsity=0.95)


def test_bad_parameters_and_statistics():
  w, h = (jnp.asarray(a, jnp.float32) for a in problem())
  twice = masked.Masked.create(w, jnp.ones(w.shape, bool))
  with pytest.raises(errors.InputError, match="already a masked leaf"):
    prune("sparsegpt", twice, h)
  with pytest.raises(errors.InputError, match="w: sparsegpt has no statistics of it"):
    registry.find("sparsegpt")({"w": w}, {"w": MATRIX}, {})
  with pytest.raises(errors.InputError, match="w: calibration gave it 5 tokens"):
    registry.find("sparsegpt")({"w": w}, {"w": MATRIX}, {"w": stats_of(h, 5.0)})
  with pytest.raises(errors.InputError, match="w: no damping up to .*, or the weight"):
    prune("sparsegpt", w.at[0, 0].set(jnp.nan), h)
