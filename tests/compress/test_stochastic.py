import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry as transforms
from effjax.core import errors, specs
from effjax.core import tree as tree_lib
from effjax.weights.leaves import coded, quantized

NAMES = ("a/up", "b/up")


@pytest.fixture(scope="module")
def tree():
  w = jax.random.normal(jax.random.key(0), (32, 8))
  spec = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", shape=(32, 8))
  unflatten = lambda leaf: tree_lib.unflatten(dict.fromkeys(NAMES, leaf))
  return unflatten(w), unflatten(spec)


def _codes(tree, **options):
  found = transforms.find("stochastic")(*tree, options={"bits": 4, **options})
  return {path: leaf.unpacked() for path, leaf in tree_lib.flatten(found).items()}


def test_a_seed_gives_the_same_codes_and_each_parameter_its_own(tree):
  first, again, other = _codes(tree), _codes(tree), _codes(tree, seed=1)
  for path in NAMES:
    np.testing.assert_array_equal(first[path], again[path])
    assert bool(jnp.any(first[path] != other[path]))
  assert bool(jnp.any(first["a/up"] != first["b/up"]))
  # What else is selected makes no difference.
  found = transforms.find("stochastic")(*tree, options={"bits": 4}, where={"path": "a"})
  np.testing.assert_array_equal(found["a"]["up"].unpacked(), first["a/up"])
  assert isinstance(found["b"]["up"], jax.Array)


def test_kinds_of_leaves(tree):
  made = transforms.find("stochastic")(*tree)
  assert isinstance(made["a"]["up"], quantized.Quantized)
  made = transforms.find("stochastic")(*tree, options={"format": "nvfp4"})
  assert isinstance(made["a"]["up"], coded.Coded)
  with pytest.raises(errors.InputError, match="a/up is already a coded leaf"):
    transforms.find("stochastic")(made, tree[1])


def test_bad_seed(tree):
  with pytest.raises(errors.InputError, match="seed=-1 must not be negative"):
    transforms.find("stochastic")(*tree, options={"seed": -1})
