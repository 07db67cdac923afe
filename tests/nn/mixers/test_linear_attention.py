"""The linear attention mixer against its definition, gradient of every parameter."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from effjax.core import errors
from effjax.nn.mixers import linear_attention
from effjax.ops.attention import rope
from effjax.ops.linear_attention import reference

ROWS, LENGTH, WIDTH, HEADS, HEAD_DIM = 2, 11, 12, 2, 6
OPTIONS = linear_attention.LinearAttentionOptions(
  num_heads=HEADS, head_dim=HEAD_DIM, chunk=4
)
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 6, [3] * 9 + [0] * 2], jnp.int32)
POSITIONS = jnp.asarray([[*range(5), *range(6)], [*range(9), 0, 0]], jnp.int32)
CASES = [(True, "rope"), (False, "none")]


def _module(causal=True, **changes):
  options = dataclasses.replace(OPTIONS, **changes)
  return linear_attention.LinearAttention(options, WIDTH, causal=causal)


@pytest.fixture(scope="module")
def inputs():
  x_BLD = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, WIDTH))
  variables = jax.jit(_module().init)(
    jax.random.key(1), x_BLD, positions=POSITIONS, segments=SEGMENTS
  )
  return variables["params"], x_BLD


def _naive(params, x_BLD, causal, position):
  q, k, v = (
    (x_BLD @ params[name]).reshape(ROWS, LENGTH, HEADS, HEAD_DIM) for name in "qkv"
  )
  q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
  rotated = None
  if position == "rope":
    rotated = (rope.rope(q, POSITIONS), rope.rope(k, POSITIONS))
  y_BLHK = reference.linear_attention(
    q, k, v, causal=causal, rotated=rotated, segments_BL=SEGMENTS
  )
  return y_BLHK.reshape(ROWS, LENGTH, -1) @ params["o"]


def _close(a, b, tolerance=1e-4):
  assert a.shape == b.shape
  limit = tolerance * max(1.0, float(jnp.abs(b).max()))
  assert float(jnp.abs(a - b).max()) <= limit


@pytest.mark.parametrize(("causal", "position"), CASES)
def test_equals_the_naive_layer(inputs, causal, position):
  params, x_BLD = inputs
  module = _module(causal, position=position)
  real = (SEGMENTS > 0)[..., None]
  probe = jax.random.normal(jax.random.key(2), x_BLD.shape) * real

  def grads(fn):
    loss = lambda params, x: (lambda y: (jnp.sum(y * probe), y * real))(fn(params, x))
    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x_BLD)

  def fast(params, x_BLD):
    variables = {"params": params}
    return module.apply(variables, x_BLD, positions=POSITIONS, segments=SEGMENTS)[0]

  wanted = grads(lambda params, x: _naive(params, x, causal, position))
  jax.tree.map(_close, grads(fast), wanted)


def test_prefill_and_steps_equal_the_parallel_form(inputs):
  params, x_BLD = inputs
  module = _module(position="rope")

  @jax.jit
  def apply(x_BLD, positions, segments, state):
    variables = {"params": params}
    return module.apply(variables, x_BLD, state, positions=positions, segments=segments)

  positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
  ones = jnp.ones((ROWS, LENGTH), jnp.int32)
  wanted, none = apply(x_BLD, positions, ones, None)
  assert none is None
  _close(apply(x_BLD, positions + 100, ones, None)[0], wanted)  # only distances count
  state = module.init_state(ROWS, 99, jnp.bfloat16)
  # The prompt of row 1 is shorter: its padding must not count.
  prompt = jnp.asarray([[1] * 7, [1] * 5 + [0] * 2])
  y, state = apply(x_BLD[:, :7], positions[:, :7], prompt, state)
  _close(y[0], wanted[0, :7])
  _close(y[1, :5], wanted[1, :5])
  for t in range(4):
    at = jnp.asarray([[7 + t], [5 + t]])
    token = jnp.take_along_axis(x_BLD, at[..., None], axis=1)
    y, state = apply(token, at, ones[:, :1], state)
    _close(y[:, 0], jnp.stack([wanted[0, 7 + t], wanted[1, 5 + t]]))
  assert state.length_B.tolist() == [11, 9]
  assert state.memory.dtype == jnp.float32


def test_bad_input(inputs):
  params, x_BLD = inputs
  variables, more = {"params": params}, dict(positions=POSITIONS, segments=SEGMENTS)
  state = _module().init_state(ROWS, LENGTH, jnp.float32)
  with pytest.raises(errors.InputError, match="cannot decode step by step"):
    _module(causal=False).apply(variables, x_BLD, state, **more)
  with pytest.raises(errors.InputError, match="no keys and values to share"):
    _module().apply(variables, x_BLD, shared=(x_BLD, x_BLD), **more)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(num_heads=0), "num_heads=0 must be positive"),
    (dict(head_dim=-1), "head_dim=-1 must be positive"),
    (dict(chunk=0), "chunk=0 must be positive"),
    (dict(position="rotary"), "unknown position 'rotary'; .*available: none, rope"),
    (dict(position="rope", head_dim=7), "head_dim=7 must be even"),
  ],
)
def test_bad_options(changes, message):
  with pytest.raises(errors.InputError, match=message):
    _module(**changes)
