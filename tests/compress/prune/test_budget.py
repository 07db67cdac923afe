"""Budgets: how much of each matrix goes."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry
from effjax.compress.prune import _budget
from effjax.core import errors
from effjax.ops.sparsity import amounts
from tests.compress.prune.conftest import SPECS


def test_owl_gives_layers_with_outliers_more():
  shares = {
    "layer_0/a": jnp.array([0.0, 0.1]),  # two stacked layers
    "layer_0/b": jnp.array([0.2, 0.3]),
    "layer_1/a": jnp.array(0.4),
  }
  layers = {path: path.split("/")[0] for path in shares}
  sizes = {"layer_0/a": 30, "layer_0/b": 10, "layer_1/a": 40}
  got = _budget.owl_sparsities(shares, layers, sizes, 0.5)
  # Shares of the layers 0.05, 0.15 and 0.4, each of 40 weights.
  placed = np.array([0, 0.1, 0.35]) / 0.35 * 2 * _budget.OWL_SPREAD
  expected = 0.5 - (placed - placed.mean())
  np.testing.assert_allclose(got["layer_0/a"], expected[:2], rtol=1e-6)
  np.testing.assert_allclose(got["layer_0/b"], expected[:2], rtol=1e-6)
  np.testing.assert_allclose(got["layer_1/a"], expected[2], rtol=1e-6)


def test_outliers_are_counted_beside_the_mean():
  scores = jnp.ones((2, 4, 5)).at[0, 0, 0].set(100.0)
  got = _budget.outlier_shares(scores, stacked=True)
  np.testing.assert_allclose(got, [1 / 20, 0])


@pytest.mark.parametrize("within", ["matrix", "output"])
@pytest.mark.parametrize("budget", ["uniform", "erk", "owl"])
def test_every_budget_and_scope(params, budget, within):
  options = {"sparsity": 0.6, "budget": budget, "within": within}
  out = registry.find("magnitude")(
    params, SPECS, options=options, where={"kind": ["matrix"]}
  )
  for name in "ab":
    w, mask = np.abs(params[name]), np.asarray(out[name].mask())
    if budget == "uniform":
      lost = 0.6
    elif budget == "erk":
      shapes = {n: params[n].shape for n in "ab"}
      lost = 1 - amounts.erk_densities(shapes, 0.6)[name]
    else:
      lost = 1 - mask.mean()
      assert abs(lost - 0.6) < _budget.OWL_SPREAD * 2
    if within == "output":
      assert (mask.sum(axis=0) == len(w) - round(lost * len(w))).all()
      w, mask = w.T, mask.T
    else:
      assert mask.sum() == mask.size - round(lost * mask.size)
      w, mask = w.reshape(1, -1), mask.reshape(1, -1)
    for row, kept in zip(w, mask, strict=True):
      assert row[kept].min() > np.where(kept, 0, row).max()


@pytest.mark.parametrize("pattern", ["2:4", "4x4", "rows", "columns"])
def test_every_pattern_leaves_zeros_where_it_says(params, pattern):
  options = {"pattern": pattern, "budget": "uniform"}
  kinds = ["matrix"] if pattern == "4x4" else ["matrix", "embedding"]
  out = registry.find("magnitude")(
    params, SPECS, options=options, where={"kind": kinds}
  )
  for name in "ab" if pattern == "4x4" else "abc":
    leaf = out[name]
    mask = np.asarray(leaf.mask())
    assert not np.asarray(leaf.dense())[~mask].any()
    # Of an embedding [V, D] the inputs are D.
    mask = mask.T if name == "c" else mask
    if pattern == "2:4":
      assert (mask.reshape(-1, 4, mask.shape[1]).sum(axis=1) == 2).all()
    else:
      axis = {"rows": 1, "columns": 0}.get(pattern)
      if axis is None:
        blocks = mask.reshape(mask.shape[0] // 4, 4, -1, 4).swapaxes(1, 2)
        kept = blocks.all(axis=(2, 3))
        assert (kept | ~blocks.any(axis=(2, 3))).all()
        assert kept.sum() == kept.size - round(0.5 * kept.size)
      else:
        assert (mask.all(axis) | ~mask.any(axis)).all()
        kept = mask.any(axis)
        assert kept.sum() == len(kept) - round(0.5 * len(kept))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"sparsity": 1.0}, "sparsity=1.0 must be at least 0 and below 1"),
    ({"sparsity": 0.3, "pattern": "2:4"}, "pattern 2:4 prunes 0.5 of the weights"),
    ({"budget": "erkk"}, "did you mean 'erk'"),
    ({"within": "row"}, "unknown within 'row'"),
    ({"within": "output"}, "not with .* budget='global'"),
    ({"pattern": "5x5"}, "a: blocks of 5x5 .* do not divide a matrix of 16x24"),
    ({"sparsity": 0.9, "pattern": "16x24"}, "do not divide"),
    ({"sparsity": 0.99, "pattern": "rows", "budget": "uniform"}, "nothing would be"),
  ],
)
def test_bad_input(params, options, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    registry.find("magnitude")(params, SPECS, options=options)
  assert "\n" not in str(caught.value)


def test_scores_that_are_not_finite(params):
  broken = params | {"b": params["b"].at[0, 0].set(jnp.nan)}
  with pytest.raises(errors.InputError, match="scores of b are not all finite"):
    registry.find("magnitude")(broken, SPECS)
