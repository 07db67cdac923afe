"""Linear attention against its definition, in outputs and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops import flops
from effjax.ops.linear_attention import api, feature_maps, reference

ROWS, LENGTH, HEADS, FEATURES, VALUES = 2, 23, 2, 6, 5
# Documents within a chunk, over several, and padding between and after them.
SEGMENTS = np.array(
  [[3] * 5 + [1] * 2 + [4] * 1 + [0] * 2 + [2] * 11 + [0] * 2, [1] * 17 + [2] * 6],
  np.int32,
)
CASES = {
  "causal_packed": dict(packed=True),
  "causal_rotated": dict(packed=True, rotated=True),
  "bidirectional_packed": dict(is_causal=False, packed=True),
  "bidirectional_rotated": dict(is_causal=False, packed=True, rotated=True),
}
CHUNKS = {"causal_packed": (4, 64), "bidirectional_packed": (1, 7, 64)}


def _arrays(seed=0, length=LENGTH, rotated=False):
  rng = np.random.default_rng(seed)
  normal = lambda size: jnp.asarray(
    rng.standard_normal((ROWS, length, HEADS, size)), jnp.float32
  )
  arrays = {"q": normal(FEATURES), "k": normal(FEATURES), "v": normal(VALUES)}
  arrays["q"] = feature_maps.elu_plus_one(arrays["q"])
  arrays["k"] = feature_maps.elu_plus_one(arrays["k"])
  if rotated:
    arrays |= {"rotated_q": normal(FEATURES), "rotated_k": normal(FEATURES)}
  return arrays


def _call(fn, arrays, **kwargs):
  if "rotated_q" in arrays:
    kwargs["rotated"] = (arrays["rotated_q"], arrays["rotated_k"])
  return fn(arrays["q"], arrays["k"], arrays["v"], **kwargs)


def _close(got, wanted, tolerance=1e-4):
  def leaf(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())

  jax.tree.map(leaf, got, wanted)


def _results(fn, arrays, segments):
  """Outputs at real tokens, and gradients of a random function of them."""
  probe = np.random.default_rng(1).standard_normal(arrays["v"].shape).astype("f4")
  probe = probe * (segments != 0)[:, :, None, None]

  @jax.jit
  def run(arrays):
    def loss(arrays):
      y_BLHP = jnp.where(segments[:, :, None, None] != 0, fn(arrays), 0)
      return jnp.sum(y_BLHP * probe), y_BLHP

    return jax.grad(loss, has_aux=True)(arrays)

  return run(arrays)


@pytest.mark.parametrize("case", CASES)
def test_equals_definition(case):
  options = dict(is_causal=True, packed=False, rotated=False) | CASES[case]
  arrays = _arrays(rotated=options["rotated"])
  segments = jnp.asarray(SEGMENTS if options["packed"] else np.ones_like(SEGMENTS))
  naive = functools.partial(
    _call, reference.linear_attention, causal=options["is_causal"], segments_BL=segments
  )
  wanted = _results(naive, arrays, segments)
  for chunk in CHUNKS.get(case, (4,)):
    fast = lambda arrays, chunk=chunk: _call(
      api.linear_attention,
      arrays,
      is_causal=options["is_causal"],
      segments_BL=segments,
      chunk=chunk,
    )[0]
    _close(_results(fast, arrays, segments), wanted)


def test_equals_the_recurrence():
  """The sums of arXiv:2006.16236, eq. 10 to 12, in float64 NumPy."""
  arrays = _arrays()
  q, k, v = (np.asarray(z, np.float64) for z in arrays.values())
  s = np.zeros((ROWS, HEADS, VALUES, FEATURES))
  z = np.zeros((ROWS, HEADS, FEATURES))
  ys = []
  for t in range(LENGTH):
    s = s + v[:, t, :, :, None] * k[:, t, :, None]
    z = z + k[:, t]
    ys.append((s @ q[:, t, ..., None])[..., 0] / (z * q[:, t]).sum(-1, keepdims=True))
  y_BLHP, state = jax.jit(api.linear_attention)(*arrays.values())
  _close(y_BLHP, np.stack(ys, axis=1))
  _close(state, np.concatenate([s, z[:, :, None]], axis=2))
  # Over the whole row, every token reads the last state.
  whole = (
    np.einsum("bhpn,blhn->blhp", s, q) / np.einsum("bhn,blhn->blh", z, q)[..., None]
  )
  bidirectional = functools.partial(api.linear_attention, is_causal=False)
  _close(jax.jit(bidirectional)(*arrays.values())[0], whole)


@pytest.mark.parametrize("rotated", [False, True])
def test_prefill_then_steps(rotated):
  arrays = _arrays(rotated=rotated)
  run = jax.jit(functools.partial(_call, api.linear_attention, chunk=4))
  wanted = run(arrays)
  cut = lambda part: {name: z[:, part] for name, z in arrays.items()}
  y, state = run(cut(slice(0, 18)))
  outputs = [y]
  for t in range(18, LENGTH):
    y, state = run(cut(slice(t, t + 1)), initial_state_BHPN=state)
    outputs.append(y)
  _close((jnp.concatenate(outputs, axis=1), state), wanted)
  assert state.dtype == jnp.float32


def test_padding_leaves_the_state_alone():
  arrays = _arrays()
  run = jax.jit(functools.partial(api.linear_attention, chunk=4))
  alone = run(*(z[:, :9] for z in arrays.values()))
  segments = jnp.asarray(np.arange(LENGTH) < 9, jnp.int32)[None].repeat(ROWS, axis=0)
  y, state = run(*arrays.values(), segments_BL=segments)
  _close((y[:, :9], state), alone)
  nothing = run(*arrays.values(), segments_BL=jnp.zeros_like(segments))
  assert not np.asarray(nothing[0]).any() and not np.asarray(nothing[1]).any()


def test_bidirectional_documents_do_not_meet():
  arrays = _arrays()

  def second_document(v_BLHP):
    y, _ = api.linear_attention(
      arrays["q"],
      arrays["k"],
      v_BLHP,
      is_causal=False,
      segments_BL=jnp.asarray(SEGMENTS),
      chunk=4,
    )
    return jnp.sum(y[0, 6] ** 2)

  gradient = np.asarray(jax.jit(jax.grad(second_document))(arrays["v"]))
  assert np.flatnonzero(np.abs(gradient[0]).sum((1, 2))).tolist() == [5, 6]
  assert not gradient[1].any()


@pytest.mark.parametrize("is_causal", [True, False])
def test_cost_grows_with_the_length(is_causal):
  """Twice the tokens take twice the products."""
  fn = functools.partial(api.linear_attention, is_causal=is_causal, chunk=16)
  counts = [
    flops.dot_flops(fn, *_arrays(length=length).values()) for length in (64, 128, 256)
  ]
  assert counts[1] == 2 * counts[0] and counts[2] == 2 * counts[1]


@pytest.mark.parametrize("is_causal", [True, False])
def test_bfloat16(is_causal):
  arrays = _arrays()
  fn = jax.jit(functools.partial(api.linear_attention, is_causal=is_causal, chunk=8))
  low = [z.astype(jnp.bfloat16) for z in arrays.values()]
  y, _ = fn(*low)
  assert y.dtype == jnp.bfloat16
  _close(y.astype(jnp.float32), fn(*arrays.values())[0], 3e-2)


def test_elu_plus_one():
  x = jnp.asarray([-1e4, -50.0, -17.0, -1.0, 0.0, 0.5, 1e4])
  wide = np.asarray(x, np.float64)
  wanted = np.where(wide > 0, wide + 1, np.exp(np.minimum(wide, 0)))
  got = feature_maps.elu_plus_one(x)
  np.testing.assert_allclose(got, wanted, rtol=1e-6)
  assert float(got[1]) > 0  # expm1(x) + 1 is 0 there
  slopes = jax.vmap(jax.grad(feature_maps.elu_plus_one))(x)
  np.testing.assert_allclose(slopes, np.minimum(wanted, 1), rtol=1e-6)


def test_bad_input():
  arrays = _arrays().values()
  state = jnp.zeros((ROWS, HEADS, VALUES + 1, FEATURES))
  with pytest.raises(errors.InputError, match="continues no state"):
    api.linear_attention(*arrays, is_causal=False, initial_state_BHPN=state)
  for is_causal in (True, False):
    with pytest.raises(errors.InputError, match="chunk"):
      api.linear_attention(*arrays, is_causal=is_causal, chunk=0)
