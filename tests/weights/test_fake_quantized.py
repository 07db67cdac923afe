"""Fake-quantized weights: forward as served, backward as the dense weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors, partition
from effjax.ops.matmul import activations as activations_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs
from effjax.weights.formats import base
from effjax.weights.leaves import fake_quantized, masked, quantized

FAKE = fake_quantized.FakeQuantized
OPTIONS = base.FormatOptions
IN, OUT = 16, 8


def _w(shape=(IN, OUT), seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _lsq(offset=False, **options):
  scale = jnp.full((2, OUT), 0.5)
  beta = jnp.full((2, OUT), -0.9) if offset else None
  return FAKE.create(_w(), OPTIONS(bits=3, group=8, **options), scale, beta)


CASES = {
  "int4": lambda: FAKE.create(_w(), OPTIONS(bits=4)),
  "w8a8": lambda: FAKE.create(_w(), OPTIONS(activations="int8")),
  "mxfp4": lambda: FAKE.create(_w(), OPTIONS(format="mxfp4", group=8)),
  "lsq": _lsq,
  "lsq_plus": lambda: _lsq(offset=True),
}


@pytest.mark.parametrize("case", CASES)
def test_every_use_is_bitwise_that_of_the_served_leaf(case):
  fake = CASES[case]()
  served = jax.jit(lambda leaf: leaf.served())(fake)
  assert leaf_lib.is_leaf_kind(served) and not isinstance(served, FAKE)
  x = _w((5, IN), 1)
  use = jax.jit(lambda leaf, x: (verbs.contract(x, leaf), verbs.dense(leaf)))
  for got, expected in zip(use(fake, x), use(served, x), strict=True):
    np.testing.assert_array_equal(got, expected)


def test_what_trains_is_in_the_leaf():
  fields = lambda leaf: partition.partition({"w": leaf}, {"w"})[0]["w"]
  assert fields(CASES["int4"]()).scale is None
  assert fields(_lsq(offset=True)).offset is not None
  x_scale = jnp.ones((1, 1))
  options = OPTIONS(activations="int8", activation_scale="absmax")
  held = lambda scale: FAKE(_w(), scale, None, FAKE.create(_w(), options).options, -2)
  fixed, learned = (
    dataclasses.replace(held(scale), x_scale=x_scale)
    for scale in (None, jnp.ones((1, OUT)))
  )
  assert fields(fixed).x_scale is None and fields(learned).x_scale is not None


@pytest.mark.parametrize("case", ["int4", "mxfp4"])
def test_gradients_go_straight_through(case):
  fake, x, dy = CASES[case](), _w((5, IN), 1), _w((5, OUT), 2)
  _, vjp = jax.vjp(lambda leaf, x: verbs.contract(x, leaf), fake, x)
  dleaf, dx = vjp(dy)
  np.testing.assert_allclose(dx, dy @ fake.served().dense().T, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(dleaf.values, x.T @ dy, rtol=1e-5, atol=1e-6)


def test_integer_products_are_executed_and_weights_see_rounded_inputs():
  fake, x, dy = CASES["w8a8"](), _w((5, IN), 1), _w((5, OUT), 2)
  product = lambda leaf, x: verbs.contract(x, leaf)
  text = [str(jax.make_jaxpr(product)(leaf, x)) for leaf in (fake, fake.served())]
  # One product, of integers: nothing is multiplied twice in a forward pass.
  assert all(t.count("int8_dot") == 1 and "dot_general" not in t for t in text)
  _, vjp = jax.vjp(product, fake, x)
  dleaf, dx = vjp(dy)
  codes, scale = activations_lib.quantize(x, "int8")
  rounded = codes.astype(jnp.float32) * scale
  np.testing.assert_allclose(dleaf.values, rounded.T @ dy, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(dx, dy @ fake.served().dense().T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_learned_scale_of_activations(grouped):
  shape = (2, IN, OUT) if grouped else (IN, OUT)
  options = OPTIONS(activations="int8", activation_scale="mse")
  scale = jnp.full((*shape[:-2], 1, OUT), 0.02)
  fake = FAKE.create(_w(shape), options, scale)
  x_scale = jnp.full((*shape[:-2], 1, 1), 0.01)
  fake = dataclasses.replace(fake, x_scale=x_scale)
  x, dy = _w((6, IN), 1), _w((6, OUT), 3)
  sizes = (jnp.asarray([4, 2], jnp.int32),) if grouped else ()

  def product(leaf, x):
    if grouped:
      return verbs.grouped_contract(x, leaf, *sizes)
    return verbs.contract(x, leaf)

  served = fake.served()
  y, vjp = jax.vjp(product, fake, x)
  np.testing.assert_array_equal(y, product(served, x))
  dleaf, dx = vjp(dy)

  def of_served(x_scale, x):
    return product(dataclasses.replace(served, x_scale=x_scale), x)

  expected_scale, expected_dx = jax.vjp(of_served, x_scale, x)[1](dy)
  np.testing.assert_allclose(dx, expected_dx, rtol=1e-4, atol=1e-5)
  factor = 1 / np.sqrt(IN * 127)
  np.testing.assert_allclose(dleaf.x_scale, expected_scale * factor, rtol=1e-4)
  assert float(jnp.max(jnp.abs(dleaf.x_scale))) > 0


def test_a_mask_stays_and_its_values_get_no_gradient():
  mask = jax.random.bernoulli(jax.random.key(3), 0.5, (IN, OUT))
  options = OPTIONS(bits=3, symmetric=False, group=4)
  fake = FAKE.create(masked.Masked.create(_w(), mask), options)
  plain = masked.Masked.create(FAKE.create(_w() * mask, options).served(), mask)
  np.testing.assert_array_equal(fake.dense(), plain.dense())
  assert isinstance(fake.served(), masked.Masked)
  x = _w((5, IN), 1)
  trainable, frozen = partition.partition({"w": fake}, {"w"})

  def loss(trainable):
    return jnp.sum(verbs.contract(x, partition.merge(trainable, frozen)["w"]) ** 2)

  gradient = jax.grad(loss)(trainable)["w"].values.values
  assert bool(jnp.all((gradient != 0) == mask))


def test_an_embedding_is_cut_along_its_rows():
  table = _w((12, IN))
  fake = FAKE.create(table, OPTIONS(bits=4, group=8), axis=-1)
  ids, x = jnp.asarray([3, 0, 3]), _w((5, IN), 1)
  served = fake.served()
  assert isinstance(served, quantized.Quantized) and served.axis == -1
  assert served.scale.shape == (12, 2)
  np.testing.assert_array_equal(verbs.lookup(fake, ids), served.lookup(ids))
  head = verbs.contract(x, fake, transpose=True)
  np.testing.assert_array_equal(head, served.contract(x, transpose=True))
  gradient = jax.grad(lambda leaf: jnp.sum(verbs.lookup(leaf, ids)))(fake).values
  np.testing.assert_array_equal(gradient[:, 0], [1, 0, 0, 2] + [0] * 8)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: FAKE.create(_w(), OPTIONS(group=5)), "group 5 does not divide"),
    (lambda: FAKE.create(_w(), OPTIONS(), jnp.ones((2, OUT))), "for 1 groups"),
    (
      lambda: FAKE.create(_w(), OPTIONS(format="fp8"), jnp.ones((1, OUT))),
      "trained steps need format='int'",
    ),
    (
      lambda: FAKE.create(_w(), OPTIONS(), offset=jnp.ones((1, OUT))),
      "an offset needs a scale",
    ),
  ],
)
def test_mistakes(make, message):
  with pytest.raises(errors.InputError, match=message):
    make()
