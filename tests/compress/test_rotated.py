"""Quantizers see through a rotation that is made while running."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import calibrate
from effjax.compress import registry as transforms
from effjax.core import errors, specs
from effjax.ops import flops
from effjax.ops.matmul import hadamard
from effjax.weights import verbs
from effjax.weights.leaves import quantized, rotated

IN, OUT, TOKENS = 24, 8, 200


@pytest.fixture
def given(rng):
  """A matrix, inputs with outliers and the statistics of those."""
  w = jnp.asarray(rng.standard_normal((IN, OUT)), jnp.float32)
  x = rng.standard_normal((TOKENS, IN)) @ rng.standard_normal((IN, IN))
  x[:, 3] *= 10
  spec = specs.ParamSpec(axes=("mlp", "embed"), kind="matrix", shape=(IN, OUT))
  return w, x.astype(np.float32), {"down": spec}


def _stats(x):
  return calibrate.InputStats(
    square_sum=jnp.asarray(np.square(x).sum(0)),
    absmax=jnp.asarray(np.abs(x).max(0)),
    count=jnp.float32(len(x)),
    hessian=jnp.asarray(x.T.astype(np.float64) @ x, jnp.float32),
  )


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize("block", [IN, 8])
def test_equals_the_quantizer_on_what_was_rotated_before(given, name, block):
  w, x, spec = given
  h = np.kron(np.eye(IN // block), hadamard.hadamard_matrix(block) / np.sqrt(block))
  x_turned = (x @ h).astype(np.float32)
  leaf = rotated.Rotated.create(w, block)
  np.testing.assert_allclose(leaf.values, h.T @ np.asarray(w), atol=1e-5)
  options = {"bits": 4, "group": 8}
  technique = transforms.find(name)
  got = technique({"down": leaf}, spec, {"down": _stats(x)}, options=options)["down"]
  expected = technique(
    {"down": leaf.values}, spec, {"down": _stats(x_turned)}, options=options
  )["down"]
  assert isinstance(got, rotated.Rotated) and got.block == block
  assert isinstance(got.values, quantized.Quantized)
  same = np.mean(np.asarray(got.values.unpacked()) == np.asarray(expected.unpacked()))
  assert same > 0.99  # Hessians differ in their last bits.
  y = x @ np.asarray(got.dense())
  np.testing.assert_allclose(
    got.contract(jnp.asarray(x)), y, atol=1e-4 * np.abs(y).max()
  )


def test_gptq_without_the_rotation_of_its_hessian_would_differ(given):
  w, x, spec = given
  leaf = rotated.Rotated.create(w)
  technique = transforms.find("gptq")
  got = technique({"down": leaf}, spec, {"down": _stats(x)})["down"].values
  naive = technique({"down": leaf.values}, spec, {"down": _stats(x)})["down"]
  assert not np.array_equal(got.unpacked(), naive.unpacked())
  h = leaf.rotate_hessian(_stats(x).hessian)
  turned = np.asarray(leaf.rotate(jnp.asarray(x)), np.float64)
  np.testing.assert_allclose(h, turned.T @ turned, rtol=1e-3, atol=1.0)


def test_of_experts_each_hessian_is_rotated(given, rng):
  w, x, _ = given
  ws = jnp.stack([w, -w[::-1]])
  hessian = jnp.stack([_stats(x).hessian, _stats(x[::2]).hessian])
  leaf = rotated.Rotated.create(ws, 12)
  got = leaf.rotate_hessian(hessian)
  for e in range(2):
    one = dataclasses.replace(leaf, values=leaf.values[e])
    np.testing.assert_allclose(got[e], one.rotate_hessian(hessian[e]), rtol=1e-4)
    np.testing.assert_allclose(one.dense(), ws[e], atol=1e-5)


def test_the_rotation_is_counted_as_work_of_no_parameter(given):
  w, x, _ = given
  leaf = rotated.Rotated.create(w)
  fn = lambda params, x: verbs.contract(x, params["down"])
  counted = flops.per_parameter(fn, {"down": leaf}, jnp.asarray(x))
  assert counted == {"down": 2 * TOKENS * IN * OUT, "": 2 * TOKENS * IN * IN}


def test_quantized_values_are_not_quantized_again(given):
  w, _, spec = given
  once = transforms.find("rtn")({"down": rotated.Rotated.create(w)}, spec)
  with pytest.raises(errors.InputError, match="already a rotated leaf"):
    transforms.find("rtn")(once, spec)


def test_sizes_that_do_not_fit():
  with pytest.raises(errors.InputError, match="order 14 is known"):
    rotated.Rotated.create(jnp.ones((14, 4)))
  with pytest.raises(errors.InputError, match="do not tile 24"):
    rotated.Rotated.create(jnp.ones((24, 4)), 16)
  assert jax.eval_shape(lambda: rotated.Rotated.create(jnp.ones((24, 4)))).block == 24


def test_static_scales_of_rotated_inputs_are_not_known(given):
  w, x, spec = given
  options = {"bits": 8, "activations": "int8"}
  leaf = rotated.Rotated.create(w)
  rtn = transforms.find("rtn")
  made = rtn({"down": leaf}, spec, options=options)["down"]
  y = np.asarray(made.contract(jnp.asarray(x)))
  assert np.abs(y - x @ np.asarray(w)).max() < 0.03 * np.abs(y).max()
  options["activation_scale"] = "absmax"
  with pytest.raises(errors.InputError, match="down is rotated, and so are its inputs"):
    rtn({"down": leaf}, spec, {"down": _stats(x)}, options=options)
