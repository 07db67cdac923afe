"""Round-to-nearest: the right leaves, the right errors, masks that stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry
from effjax.core import errors, specs
from effjax.weights.leaves import masked, quantized

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
EMBEDDING = specs.ParamSpec(axes=("vocab", "embed"), kind="embedding")
SPECS = {"w": MATRIX, "table": EMBEDDING, "norm": specs.ParamSpec(axes=(), kind="norm")}


@pytest.fixture
def params(rng):
  return {
    "w": jnp.asarray(rng.standard_normal((3, 32, 8)), jnp.float32),
    "table": jnp.asarray(rng.standard_normal((20, 16)), jnp.float32),
    "norm": jnp.ones(4),
  }


def _rtn(params, **options):
  where = options.pop("where", {"kind": ("matrix", "embedding")})
  return registry.find("rtn")(params, SPECS, where=where, options=options)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 8), (4, 16), (3, 8), (2, 16)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_half_a_step(params, bits, group, symmetric):
  out = _rtn(params, bits=bits, group=group, symmetric=symmetric)
  for name, axis in (("w", -2), ("table", -1)):
    leaf = out[name]
    assert isinstance(leaf, quantized.Quantized) and leaf.axis == axis
    error = np.abs(np.asarray(leaf.dense()) - np.asarray(params[name]))
    size = params[name].shape[axis]
    step = np.repeat(np.asarray(leaf.scale), group or size, axis=axis)
    assert np.all(error <= step / 2 * (1 + 1e-5))
  assert out["norm"] is params["norm"]


def test_codes_equal_an_independent_rounding(params):
  leaf = _rtn(params, bits=4, group=8)["w"]
  w = np.asarray(params["w"], np.float64).reshape(3, 4, 8, 8)
  scale = np.abs(w).max(axis=2, keepdims=True) / 7
  expected = np.rint(w / scale).reshape(3, 32, 8)
  agree = np.mean(np.asarray(leaf.unpacked()) == expected)
  assert agree >= 0.995


def test_a_masked_weight_keeps_its_zeros(params):
  pruned = registry.find("magnitude")(params, SPECS, options={"sparsity": 0.5})
  both = _rtn(pruned, bits=4, group=8, where=None)
  assert isinstance(both["w"], masked.Masked)
  assert isinstance(both["w"].values, quantized.Quantized)
  zero = ~np.asarray(pruned["w"].mask())
  assert np.all(np.asarray(both["w"].dense())[zero] == 0)


def test_dynamic_activations_are_recorded_on_the_leaf(params):
  leaf = _rtn(params, activations="int8")["table"]
  assert leaf.activations == "int8" and leaf.scale.shape == (20, 1)
  x = jax.random.normal(jax.random.key(0), (5, 16))
  dense = x @ leaf.dense().T
  error = jnp.max(jnp.abs(leaf.contract(x, transpose=True) - dense))
  assert 0 < error < 0.02 * jnp.max(jnp.abs(dense))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"group": 12}, "table: group 12 does not divide"),
    ({"bits": 9}, "bits=9"),
    ({"activations": "int8", "group": 8}, "needs group=0"),
    ({"activations": "int5"}, "unknown activations"),
    ({"where": {"kind": "norm"}}, "cannot quantize norm"),
  ],
)
def test_mistakes(params, options, message):
  with pytest.raises(errors.InputError, match=message):
    _rtn(params, **options)


def test_quantizing_twice_is_refused(params):
  once = _rtn(params)
  with pytest.raises(errors.InputError, match="already a quantized leaf"):
    _rtn(once)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(params, value):
  damaged = params | {"table": params["table"].at[3, 1].set(value)}
  with pytest.raises(errors.InputError, match="table holds infinities or NaNs"):
    _rtn(damaged, bits=4)
