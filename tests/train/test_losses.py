"""Cross entropy against float64 NumPy and plain autodiff, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors, partition
from effjax.train.losses import base, cross_entropy
from effjax.weights import verbs
from effjax.weights.leaves import quantized

OPTIONS = cross_entropy.CrossEntropyOptions


def _numpy_nll(logits, targets):
  wide = np.asarray(logits, np.float64)
  top = wide.max(-1, keepdims=True)
  lse = np.log(np.exp(wide - top).sum(-1)) + top[..., 0]
  return lse - np.take_along_axis(wide, np.asarray(targets)[..., None], -1)[..., 0]


def _logits(rng, scale=30.0):
  logits = scale * rng.normal(size=(2, 3, 11))
  targets = rng.integers(0, 11, (2, 3))
  return jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.int32)


def test_value_equals_float64(rng):
  logits, targets = _logits(rng)
  expected = _numpy_nll(logits, targets)
  np.testing.assert_allclose(
    cross_entropy.nll_of(logits, targets), expected, rtol=1e-6, atol=1e-5
  )
  # Far from zero the softmax saturates, and nothing overflows.
  far = cross_entropy.nll_of(logits + 1e4, targets)
  np.testing.assert_allclose(far, expected, rtol=1e-3, atol=1e-2)


def test_gradient_is_softmax_minus_one_hot(rng):
  logits, targets = _logits(rng, scale=3.0)
  weights = jnp.asarray(rng.random((2, 3)), jnp.float32)
  gradient = jax.grad(lambda x: jnp.sum(cross_entropy.nll_of(x, targets) * weights))
  expected = jax.nn.softmax(logits) - jax.nn.one_hot(targets, 11)
  np.testing.assert_allclose(
    gradient(logits), expected * weights[..., None], rtol=1e-5, atol=1e-7
  )
  low = gradient(logits.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("chunk", [1, 4, 6, 1000])
def test_chunks_change_nothing(rng, chunk):
  x_BLD = jnp.asarray(rng.normal(size=(2, 6, 5)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(11, 5)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 11, (2, 6)), jnp.int32)
  weights = jnp.asarray(rng.random((2, 6)), jnp.float32)
  head_fn = lambda x, w: verbs.contract(x, w, transpose=True)

  def chunked(x, w):
    return cross_entropy.summed_over_chunks(head_fn, x, w, targets, weights, chunk)

  def whole(x, w):
    logs = jax.nn.log_softmax(head_fn(x, w))
    hits = jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
    return -jnp.sum(hits * weights)

  both = jax.jit(
    lambda *a: [jax.value_and_grad(f, (0, 1))(*a) for f in (chunked, whole)]
  )
  (value, grads), (expected, expected_grads) = both(x_BLD, head)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(jax.jit(chunked)(x_BLD, head), expected, rtol=1e-6)
  for a, b in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  scaled = jax.grad(lambda x: 3 * chunked(x, head))(x_BLD)
  np.testing.assert_allclose(scaled, 3 * expected_grads[0], rtol=1e-5, atol=1e-6)


def test_chunks_work_on_a_head_of_codes(rng):
  codes = jnp.asarray(rng.integers(-127, 128, (11, 6)), jnp.int8)
  scale = jnp.asarray(rng.random((11, 1)) / 50, jnp.float32)
  head = quantized.Quantized.create(codes, scale, bits=8, axis=-1)
  x_BLD = jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 11, (2, 4)), jnp.int32)
  head_fn = lambda x, w: verbs.contract(x, w, transpose=True)

  def chunked(x):
    return cross_entropy.summed_over_chunks(
      head_fn, x, head, targets, jnp.ones((2, 4)), 4
    )

  whole = lambda x: jnp.sum(cross_entropy.nll_of(x @ head.dense().T, targets))
  found, expected = (jax.value_and_grad(f)(x_BLD) for f in (chunked, whole))
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _loss(model, params, batch, collections=None, **options):
  loss_fn = cross_entropy.cross_entropy(OPTIONS(**options))
  variables = {"params": params, **(collections or {})}
  return loss_fn(model, variables, batch, jax.random.key(0))


def test_sums_are_over_weighted_targets(toy):
  batch = toy.batch()
  loss = _loss(toy.make_model(), toy.params, batch)
  logits, _ = toy.make_model().apply({"params": toy.params}, batch["inputs"])
  nll = _numpy_nll(logits, batch["targets"])
  assert float(loss.weight) == batch["weights"].sum()
  np.testing.assert_allclose(loss.objective, (nll * batch["weights"]).sum(), rtol=1e-5)
  assert loss.metrics == {} and loss.collections == {}


def test_a_model_hands_over_its_head(toy):
  batch = toy.batch()
  value = lambda model: jax.value_and_grad(
    lambda p: _loss(model, p, batch, chunk=16).objective
  )(toy.params)
  plain, handed = value(toy.make_model()), value(toy.make_model(has_readout=True))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(handed), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_collections_are_summed_logged_and_kept(toy):
  model = toy.make_model(auxiliary=0.5, counts=True)
  batch = toy.batch()
  start = {"state": {"seen": jnp.float32(7)}}
  plain = _loss(toy.make_model(), toy.params, batch)
  loss = _loss(model, toy.params, batch, start)
  hidden = float(loss.metrics["hidden"]) / float(loss.weight)
  extra = float(loss.objective) - float(plain.objective)
  np.testing.assert_allclose(extra, 0.5 * hidden * float(loss.weight), rtol=1e-4)
  np.testing.assert_allclose(loss.metrics["auxiliary_loss"], extra, rtol=1e-4)
  np.testing.assert_allclose(loss.metrics["cross_entropy"], plain.objective)
  assert float(loss.collections["state"]["seen"]) == 7 + batch["inputs"].size


def test_logged_averages_layers():
  sown = {"metrics": {"run_0": {"load": (jnp.array([1.0, 3.0]),)}, "load": (5.0,)}}
  assert float(base.logged(sown)["load"]) == 3.0


def test_bad_chunk():
  with pytest.raises(errors.InputError, match="chunk=-1"):
    OPTIONS(chunk=-1)


def test_frozen_head_still_gives_gradients_to_the_rest(toy):
  model = toy.make_model(has_readout=True)
  trainable, frozen = partition.partition(toy.params, {"up"})
  gradient = jax.grad(
    lambda t: _loss(model, partition.merge(t, frozen), toy.batch()).objective
  )(trainable)
  assert float(jnp.abs(gradient["up"]).max()) > 0
