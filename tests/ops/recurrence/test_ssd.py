"""Chunked SSD against the recurrence itself, in outputs and every gradient."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.recurrence import api, chunked, reference

SHAPE = dict(rows=2, length=37, heads=4, head_dim=5, groups=2, state_dim=3)
SEGMENTS = np.zeros((2, 37), np.int32)
SEGMENTS[0] = [3] * 9 + [1] * 7 + [0] * 3 + [3] * 12 + [2] * 1 + [0] * 5
SEGMENTS[1] = [0] * 2 + [1] * 10 + [0] * 4 + [1] * 16 + [0] * 5  # one document

CASES = {
  "plain": dict(),
  "one_group": dict(shape=dict(groups=1)),
  "group_a_head": dict(shape=dict(groups=4)),
  "state": dict(state=True),
  "segments": dict(segments=True),
  "segments_state": dict(segments=True, state=True),
  "one_group_segments_state": dict(shape=dict(groups=1), segments=True, state=True),
}


CHUNKS = {"plain": (1, 64), "segments_state": (5, 37)}

jit_ssd = jax.jit(chunked.ssd, static_argnames="chunk")


def _inputs(state=False, segments=False, shape=None, seed=0, log_decay=1.0):
  """Random arguments of `ssd`: arrays to differentiate, and the rest."""
  s = SHAPE | (shape or {})
  rng = np.random.default_rng(seed)
  normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)
  rows, length, heads = s["rows"], s["length"], s["heads"]
  arrays = dict(
    x_BLHP=normal(rows, length, heads, s["head_dim"]),
    dt_BLH=jax.nn.softplus(normal(rows, length, heads)),
    a_H=-log_decay * jnp.exp(normal(heads)),
    b_BLGN=normal(rows, length, s["groups"], s["state_dim"]),
    c_BLGN=normal(rows, length, s["groups"], s["state_dim"]),
  )
  if state:
    arrays["initial_state_BHPN"] = normal(rows, heads, s["head_dim"], s["state_dim"])
  return arrays, dict(segments_BL=jnp.asarray(SEGMENTS)) if segments else {}


def _close(got, wanted, tolerance=1e-4):
  def leaf(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())

  jax.tree.map(leaf, got, wanted)


def _results(fn, arrays, fixed, weights):
  """Outputs at real tokens, final state, and gradients of a random function of both."""

  @jax.jit
  def run(arrays):
    def loss(arrays):
      y_BLHP, state_BHPN = fn(**arrays, **fixed)
      if "segments_BL" in fixed:
        y_BLHP = jnp.where(fixed["segments_BL"][:, :, None, None] != 0, y_BLHP, 0)
      total = jnp.sum(y_BLHP * weights[0]) + jnp.sum(state_BHPN * weights[1])
      return total, (y_BLHP, state_BHPN)

    return jax.grad(loss, has_aux=True)(arrays)

  return run(arrays)


def _weights(arrays, fixed, seed=1):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(functools.partial(reference.ssd, **fixed), **arrays)
  return [jnp.asarray(rng.standard_normal(s.shape), jnp.float32) for s in shapes]


@pytest.mark.parametrize("case", CASES)
def test_equals_recurrence(case):
  arrays, fixed = _inputs(**CASES[case])
  weights = _weights(arrays, fixed)
  wanted = _results(reference.ssd, arrays, fixed, weights)
  for chunk in CHUNKS.get(case, (8,)):
    fn = functools.partial(chunked.ssd, chunk=chunk)
    _close(_results(fn, arrays, fixed, weights), wanted)


def test_reference_is_the_equation():
  """A float64 loop in NumPy, which shares no code with either form."""
  arrays, _ = _inputs(state=True)
  x, dt, a, b, c, h = (np.asarray(z, np.float64) for z in arrays.values())
  ys = []
  for t in range(x.shape[1]):
    h = np.exp(dt[:, t] * a)[..., None, None] * h
    b_t, c_t = (np.repeat(z[:, t], 2, axis=1) for z in (b, c))
    h = h + (dt[:, t, :, None] * x[:, t])[..., None] * b_t[:, :, None]
    ys.append((h @ c_t[..., None])[..., 0])
  wanted = np.stack(ys, 1), h
  _close(jax.jit(reference.ssd)(**arrays), wanted, 1e-5)
  _close(jit_ssd(**arrays, chunk=16), wanted)


def test_gradient_equals_finite_differences():
  shape = dict(rows=1, length=5, heads=2, head_dim=2, groups=1, state_dim=2)
  arrays, _ = _inputs(shape=shape, state=True)
  weights = _weights(arrays, {})

  @jax.jit
  def loss(*values):
    outputs = chunked.ssd(**dict(zip(arrays, values, strict=True)), chunk=2)
    return sum(jnp.sum(o * w) for o, w in zip(outputs, weights, strict=True))

  chex.assert_numerical_grads(
    loss, tuple(arrays.values()), order=1, atol=2e-2, modes=("rev",)
  )


def test_second_derivative():
  """Optimizers that use curvature differentiate the written gradient."""
  arrays, fixed = _inputs(segments=True, shape=dict(heads=2, head_dim=2))

  def product(fn):
    loss = lambda arrays: jnp.sum(jnp.tanh(fn(**arrays, **fixed)[0]) ** 2)
    masked = lambda arrays: jax.grad(loss)(
      arrays | {"x_BLHP": arrays["x_BLHP"] * (SEGMENTS != 0)[:, :, None, None]}
    )
    direction = jax.tree.map(jnp.ones_like, arrays)
    return jax.jit(lambda z: jax.jvp(masked, (z,), (direction,)))(arrays)

  def naive(**kwargs):
    y_BLHP, state = reference.ssd(**kwargs)
    return jnp.where((SEGMENTS != 0)[:, :, None, None], y_BLHP, 0), state

  def fast(**kwargs):
    y_BLHP, state = chunked.ssd(**kwargs, chunk=8)
    return jnp.where((SEGMENTS != 0)[:, :, None, None], y_BLHP, 0), state

  _close(product(fast), product(naive))


@pytest.mark.parametrize("mixed", [False, True])
def test_strong_decay(mixed):
  """dt a of -50 a token: gradients stay finite, and equal to those of the recurrence.

  Mixed with tokens that hardly decay, running sums reach thousands where differences
  of a thousandth matter: plain float32 sums miss the tolerance.
  """
  arrays, _ = _inputs(shape=dict(length=130), log_decay=1.0)
  strong = np.ones((2, 130, 4)) if not mixed else np.arange(130)[:, None] % 20 < 10
  arrays["dt_BLH"] = jnp.asarray(
    np.broadcast_to(np.where(strong, 50.0, 1e-2), (2, 130, 4)), jnp.float32
  )
  arrays["a_H"] = jnp.asarray([-1.0, -1.03, -0.97, -3.0])
  arrays["x_BLHP"] = arrays["x_BLHP"] / arrays["dt_BLH"][..., None]
  weights = _weights(arrays, {})
  wanted = _results(reference.ssd, arrays, {}, weights)
  _close(
    _results(functools.partial(chunked.ssd, chunk=128), arrays, {}, weights), wanted
  )


def test_extreme_decay_is_finite():
  arrays, _ = _inputs()
  arrays["a_H"] = jnp.full((4,), -1e6)
  weights = _weights(arrays, {})
  fn = functools.partial(chunked.ssd, chunk=16)
  wanted = _results(reference.ssd, arrays, {}, weights)
  _close(_results(fn, arrays, {}, weights), wanted)


def test_prefill_then_steps_equal_parallel():
  arrays, _ = _inputs(state=True)
  wanted = jit_ssd(**arrays, chunk=8)
  a_H, state = arrays.pop("a_H"), arrays.pop("initial_state_BHPN")
  run = jax.jit(functools.partial(api.ssd, a_H=a_H, chunk=8))
  prefix = {name: z[:, :30] for name, z in arrays.items()}
  head, state = run(**prefix, initial_state_BHPN=state)
  outputs = [head]
  for t in range(30, 37):
    token = {name: z[:, t : t + 1] for name, z in arrays.items()}
    y, state = run(**token, initial_state_BHPN=state)
    outputs.append(y)
  _close((jnp.concatenate(outputs, axis=1), state), wanted, 1e-5)


def test_step_form_is_the_chunked_form():
  """With one token the entry changes form, not meaning."""
  arrays, _ = _inputs(shape=dict(length=1), state=True)
  fixed = dict(segments_BL=jnp.asarray([[1], [0]], jnp.int32))
  weights = _weights(arrays, fixed)
  wanted = _results(chunked.ssd, arrays, fixed, weights)
  _close(_results(api.ssd, arrays, fixed, weights), wanted, 1e-5)
  state = arrays.pop("initial_state_BHPN")
  np.testing.assert_array_equal(wanted[1][1][1], state[1])
  _close(jax.jit(api.ssd)(**arrays), jit_ssd(**arrays), 1e-5)


def test_padding_changes_nothing():
  """A right-padded row ends in the state of the row without padding."""
  arrays, _ = _inputs(state=True)
  segments = jnp.asarray(np.arange(37) < np.array([[11], [37]]), jnp.int32)
  y_BLHP, state = jit_ssd(**arrays, segments_BL=segments, chunk=8)
  assert np.isfinite(np.asarray(y_BLHP)).all()
  per_token = ("x_BLHP", "dt_BLH", "b_BLGN", "c_BLGN")
  alone = arrays | {name: arrays[name][:, :11] for name in per_token}
  y_alone, state_alone = jit_ssd(**alone, chunk=8)
  _close((y_BLHP[0, :11], state[0]), (y_alone[0], state_alone[0]), 1e-5)


def test_documents_are_isolated():
  """No gradient flows between documents, nor from the state into later ones."""
  arrays, fixed = _inputs(segments=True, state=True)

  def row0_tail(x_BLHP, state):
    values = arrays | {"x_BLHP": x_BLHP, "initial_state_BHPN": state}
    return jnp.sum(chunked.ssd(**values, **fixed, chunk=8)[0][0, 19:31] ** 2)

  grads = jax.jit(jax.grad(row0_tail, (0, 1)))
  dx_BLHP, dstate = grads(arrays["x_BLHP"], arrays["initial_state_BHPN"])
  touched = np.abs(np.asarray(dx_BLHP[0])).sum((1, 2)) > 0
  np.testing.assert_array_equal(np.flatnonzero(touched), np.arange(19, 31))
  assert not np.asarray(dstate).any()


def test_jit_and_vmap():
  arrays, fixed = _inputs(segments=True, state=True)
  weights = _weights(arrays, fixed)
  fn = functools.partial(chunked.ssd, chunk=8)
  plain = fn(**arrays, **fixed)
  _close(jax.jit(fn)(**arrays, **fixed), plain, 1e-5)

  stacked = jax.tree.map(lambda z: jnp.stack([z, 0.5 * z]), arrays)

  def grads(arrays):
    def loss(arrays):
      y, state = fn(**arrays, **fixed)
      return jnp.sum(y * weights[0]) + jnp.sum(state * weights[1])

    return jax.grad(loss)(arrays)

  batched = jax.jit(jax.vmap(grads))(stacked)
  for i in range(2):
    alone = jax.jit(grads)(jax.tree.map(lambda z, i=i: z[i], stacked))
    _close(jax.tree.map(lambda z, i=i: z[i], batched), alone, 1e-5)


def test_bfloat16():
  """Products in bfloat16, decays and state in float32; gradients near those in fp32."""
  arrays, fixed = _inputs(segments=True, state=True)
  weights = _weights(arrays, fixed)
  wanted = _results(reference.ssd, arrays, fixed, weights)
  low = dict(arrays)
  for name in ("x_BLHP", "b_BLGN", "c_BLGN"):
    low[name] = arrays[name].astype(jnp.bfloat16)
  fn = functools.partial(chunked.ssd, chunk=8)
  y_BLHP, state = jax.eval_shape(fn, **low, **fixed)
  assert y_BLHP.dtype == jnp.bfloat16
  assert state.dtype == jnp.float32
  got = _results(fn, low, fixed, weights)
  assert got[0]["x_BLHP"].dtype == jnp.bfloat16
  _close(jax.tree.map(lambda z: z.astype(jnp.float32), got), wanted, 3e-2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dt_BLH=(2, 37, 3)), "dt has shape"),
    (dict(b_BLGN=(2, 37, 3, 3), c_BLGN=(2, 37, 3, 3)), "3 groups must divide"),
    (dict(c_BLGN=(2, 37, 2, 4)), "c has shape"),
    (dict(initial_state_BHPN=(2, 4, 3, 5)), "initial_state has shape"),
  ],
)
def test_wrong_shapes(change, message):
  arrays, _ = _inputs()
  arrays |= {name: jnp.zeros(shape) for name, shape in change.items()}
  with pytest.raises(errors.InputError, match=message):
    api.ssd(**arrays)


def test_wrong_chunk():
  with pytest.raises(errors.InputError, match="chunk must be at least 1"):
    api.ssd(**_inputs()[0], chunk=0)


@pytest.mark.oracle
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_transformers(groups):
  torch = pytest.importorskip("torch")
  mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
  arrays, _ = _inputs(shape=dict(groups=groups), state=True)
  weights = _weights(arrays, {})
  tensors = {
    n: torch.tensor(np.asarray(z), requires_grad=True) for n, z in arrays.items()
  }
  # Called by name: kernels of other vendors may replace the function, not its meaning.
  y, state = mamba2.mamba2_chunk_scan(
    *(tensors[n] for n in ("x_BLHP", "dt_BLH", "a_H", "b_BLGN", "c_BLGN")),
    chunk_size=16,
    initial_states=tensors["initial_state_BHPN"],
    return_final_states=True,
  )
  loss = (y * torch.tensor(np.asarray(weights[0]))).sum()
  (loss + (state * torch.tensor(np.asarray(weights[1]))).sum()).backward()
  wanted = (
    {n: t.grad.numpy() for n, t in tensors.items()},
    (
      y.detach().numpy(),
      state.detach().numpy(),
    ),
  )
  _close(_results(functools.partial(chunked.ssd, chunk=8), arrays, {}, weights), wanted)
