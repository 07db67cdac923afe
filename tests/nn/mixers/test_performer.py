"""The Performer mixer: every gradient, redrawn features, the softmax limit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from effjax.core import errors
from effjax.nn.mixers import performer
from effjax.ops.attention import rope
from effjax.ops.linear_attention import random_features, reference

ROWS, LENGTH, WIDTH, HEADS, HEAD_DIM = 2, 11, 12, 2, 6
OPTIONS = performer.PerformerOptions(
  num_heads=HEADS, head_dim=HEAD_DIM, num_features=16, seed=5, chunk=4
)
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 6, [3] * 9 + [0] * 2], jnp.int32)
POSITIONS = jnp.asarray([[*range(5), *range(6)], [*range(9), 0, 0]], jnp.int32)
MORE = dict(positions=POSITIONS, segments=SEGMENTS)


def _module(causal=True, **changes):
  options = dataclasses.replace(OPTIONS, **changes)
  return performer.Performer(options, WIDTH, causal=causal)


@pytest.fixture(scope="module")
def inputs():
  x_BLD = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, WIDTH))
  init = jax.jit(_module().init)
  return init(jax.random.key(1), x_BLD, **MORE)["params"], x_BLD


def _heads(params, x_BLD, position):
  q, k, v = (
    (x_BLD @ params[name]).reshape(ROWS, LENGTH, HEADS, HEAD_DIM) for name in "qkv"
  )
  if position == "rope":
    q, k = rope.rope(q, POSITIONS), rope.rope(k, POSITIONS)
  return q, k, v


def _close(a, b, tolerance=1e-4):
  assert a.shape == b.shape
  limit = tolerance * max(1.0, float(jnp.abs(b).max()))
  assert float(jnp.abs(a - b).max()) <= limit


@pytest.mark.parametrize(("causal", "position"), [(True, "rope"), (False, "none")])
def test_equals_the_naive_layer(inputs, causal, position):
  params, x_BLD = inputs
  module = _module(causal, position=position)
  w_MK = jnp.asarray(random_features.fixed(5, 16, HEAD_DIM))
  real = (SEGMENTS > 0)[..., None]
  probe = jax.random.normal(jax.random.key(2), x_BLD.shape) * real

  def grads(fn):
    loss = lambda params, x: (lambda y: (jnp.sum(y * probe), y * real))(fn(params, x))
    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x_BLD)

  def naive(params, x_BLD):
    q, k, v = _heads(params, x_BLD, position)
    q, k = reference.favor_features(q, w_MK), reference.favor_features(k, w_MK)
    y_BLHK = reference.linear_attention(q, k, v, causal=causal, segments_BL=SEGMENTS)
    return y_BLHK.reshape(ROWS, LENGTH, -1) @ params["o"]

  fast = lambda params, x_BLD: module.apply({"params": params}, x_BLD, **MORE)[0]
  jax.tree.map(_close, grads(fast), grads(naive))


def test_many_features_approach_softmax_attention(inputs):
  params, x_BLD = inputs[0], 0.5 * inputs[1]  # the variance grows like exp(|q + k|^2)
  q, k, v = _heads(params, x_BLD, "rope")
  scores_BHLS = jnp.einsum("blhk,bshk->bhls", q, k) / HEAD_DIM**0.5
  seen_BLS = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
  seen_BHLS = jnp.broadcast_to(seen_BLS[:, None], scores_BHLS.shape)
  weights_BHLS = jax.nn.softmax(scores_BHLS, where=jnp.tril(seen_BHLS))
  y_BLHK = jnp.einsum("bhls,bshk->blhk", weights_BHLS, v)
  wanted = y_BLHK.reshape(ROWS, LENGTH, -1) @ params["o"]
  errors = []
  for num_features in (64, 4096):
    module = _module(position="rope", num_features=num_features)
    got = jax.jit(module.apply)({"params": params}, x_BLD, **MORE)[0]
    errors.append(float(jnp.std((got - wanted)[SEGMENTS > 0])))
  assert errors[1] < 0.03 * float(jnp.std(wanted[SEGMENTS > 0]))
  assert errors[1] < 0.3 * errors[0]


def test_features_are_drawn_anew_in_training_only(inputs):
  params, x_BLD = inputs
  ones = dict(positions=POSITIONS, segments=jnp.ones_like(SEGMENTS))

  @functools.partial(jax.jit, static_argnums=0)
  def run(redraw, state, rngs):
    module = _module(redraw=redraw)
    return module.apply({"params": params}, x_BLD, state, **ones, rngs=rngs)[0]

  stream = lambda seed: {"dropout": jax.random.key(seed)}
  fixed = run(True, None, {})
  first, second = run(True, None, stream(0)), run(True, None, stream(1))
  for a, b in ((first, fixed), (second, fixed), (first, second)):
    assert float(jnp.abs(a - b).max()) > 1e-3
  assert bool(jnp.all(first == run(True, None, stream(0))))
  assert bool(jnp.all(fixed == run(False, None, stream(0))))
  # A decoding state holds sums of fixed features, with or without the stream.
  state = _module().init_state(ROWS, LENGTH, jnp.float32)
  _close(run(True, state, stream(0)), fixed, 1e-5)


def test_drawn_features_give_finite_gradients(inputs):
  params, x_BLD = inputs

  def loss(params):
    rngs = {"dropout": jax.random.key(3)}
    y = _module().apply({"params": params}, x_BLD, **MORE, rngs=rngs)[0]
    return jnp.sum(y**2)

  for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
    assert bool(jnp.isfinite(g).all()) and bool(jnp.any(g != 0))


def test_bad_input(inputs):
  params, x_BLD = inputs
  state = _module().init_state(ROWS, LENGTH, jnp.float32)
  with pytest.raises(errors.InputError, match="cannot decode step by step"):
    _module(causal=False).apply({"params": params}, x_BLD, state, **MORE)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(num_features=0), "num_features=0 must be positive"),
    (dict(seed=-1), "seed=-1 must be 0 or above"),
    (dict(position="alibi"), "unknown position 'alibi'"),
  ],
)
def test_bad_options(changes, message):
  with pytest.raises(errors.InputError, match=message):
    _module(**changes)
