"""Exactly the smallest weights go, over all selected parameters together."""

import numpy as np
import pytest

from effjax.compress import registry
from effjax.core import errors
from tests.compress.prune.conftest import SPECS


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7])
def test_equals_a_global_sort(params, sparsity):
  out = registry.find("magnitude")(params, SPECS, options={"sparsity": sparsity})
  values = np.concatenate([np.asarray(params[n]).ravel() for n in "ab"])
  order = np.argsort(np.abs(values), kind="stable")
  expected = np.ones(values.size, bool)
  expected[order[: round(sparsity * values.size)]] = False
  got = np.concatenate([np.asarray(out[n].mask()).ravel() for n in "ab"])
  np.testing.assert_array_equal(got, expected)
  assert out["c"] is params["c"]


def test_selection_by_path(params):
  out = registry.find("magnitude")(params, SPECS, where={"path": "^b$"})
  assert out["a"] is params["a"]
  assert int(out["b"].mask().sum()) == 24 * 8 // 2


@pytest.mark.parametrize("sparsity", [1.5, 1.0, -0.1])
def test_sparsity_out_of_range(params, sparsity):
  with pytest.raises(errors.InputError, match="sparsity="):
    registry.find("magnitude")(params, SPECS, options={"sparsity": sparsity})


def test_pruning_twice_is_refused(params):
  once = registry.find("magnitude")(params, SPECS)
  with pytest.raises(errors.InputError, match="already pruned"):
    registry.find("magnitude")(once, SPECS)


def test_unknown_transform_names_the_nearest():
  with pytest.raises(errors.InputError, match="did you mean 'magnitude'"):
    registry.find("magnitud")
