"""States carried from chunk to chunk, and the gradients of that, written out.

Only what depends on the state runs token chunk after token chunk; everything else is
the caller's, for all chunks at once. Chunks are indexed where they stand: scanning over
them would move them to the front. State and decays are float32, products take the
dtype of the arrays they are given.

Letters: Z chunks of C tokens, K and V sizes of a key and of a value head.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from effjax.ops.recurrence import across_devices, layout


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(
  decay_BHZK: jax.Array,
  added_BHZKV: jax.Array,
  state_BHKV: jax.Array,
  over: across_devices.Over,
) -> tuple[jax.Array, jax.Array]:
  """S' = diag(decay) S + added, chunk by chunk; all float32.

  Returns:
    The state before each chunk, `[B, H, Z, K, V]`, and the one after the last.
  """
  return _linear(decay_BHZK, added_BHZKV, state_BHKV, over)[0]


def _linear(decay_BHZK, added_BHZKV, state_BHKV, over):
  before_BHZKV, state_BHKV = _linear_scan(decay_BHZK, added_BHZKV, state_BHKV, over)
  return (before_BHZKV, state_BHKV), (decay_BHZK, before_BHZKV)


def _linear_gradient(over, residuals, cotangents):
  decay_BHZK, before_BHZKV = residuals
  dbefore_BHZKV, dstate_BHKV = cotangents
  dafter_BHZKV, dstate_BHKV = _linear_scan(
    decay_BHZK, dbefore_BHZKV, dstate_BHKV, over, reverse=True
  )
  ddecay_BHZK = jnp.sum(dafter_BHZKV * before_BHZKV, axis=-1)
  return ddecay_BHZK, dafter_BHZKV, dstate_BHKV


linear.defvjp(_linear, _linear_gradient)


def _linear_scan(decay_BHZK, added_BHZKV, state_BHKV, over, *, reverse=False):
  """The states that each chunk meets, and the one after the last one met."""

  def body(carry, z):
    state, met = carry
    met = _put(met, state, z)
    return (_at(decay_BHZK, z)[..., None] * state + _at(added_BHZKV, z), met), None

  carry = (state_BHKV, jnp.zeros_like(added_BHZKV))
  chunks = jnp.arange(added_BHZKV.shape[2])
  (state_BHKV, met_BHZKV), _ = lax.scan(body, carry, chunks, reverse=reverse)
  if not over:
    return met_BHZKV, state_BHKV
  return across_devices.joined(
    met_BHZKV, state_BHKV, decay_BHZK[..., None], 2, over, reverse=reverse
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def delta(
  w_BHZCK: jax.Array,
  u_BHZCV: jax.Array,
  k_BHZCK: jax.Array,
  decay_BHZ: jax.Array,
  state_BHKV: jax.Array,
  over: across_devices.Over,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """N = U - W S and S' = decay S + K^T N, chunk by chunk.

  Args:
    w_BHZCK, u_BHZCV: what a chunk removes from its state and what it writes instead.
    k_BHZCK: keys, each times the decay to the end of its chunk.
    decay_BHZ: float32 decays over whole chunks.
    state_BHKV: float32 state before the first chunk.
    over: mesh axes, if these are the chunks of a slice.

  Returns:
    new_BHZCV in the dtype of u; the state before each chunk, `[B, H, Z, K, V]`, and the
    one after the last, both float32.
  """
  return _delta(w_BHZCK, u_BHZCV, k_BHZCK, decay_BHZ, state_BHKV, over)[0]


def _delta(w_BHZCK, u_BHZCV, k_BHZCK, decay_BHZ, state_BHKV, over):
  whole_BHKK = None
  if over:
    # Columns of values that start from the identity and write nothing become the
    # transition of the slice: the products of decay I - K^T W.
    key_dim = state_BHKV.shape[2]
    one_BHKK = jnp.broadcast_to(jnp.eye(key_dim), (*state_BHKV.shape[:3], key_dim))
    wide_BHKV = jnp.concatenate([one_BHKK, state_BHKV], axis=-1)
    written_BHZCV = jnp.pad(u_BHZCV, [(0, 0)] * 4 + [(key_dim, 0)])
    wide_BHKV = _delta_scan(w_BHZCK, written_BHZCV, k_BHZCK, decay_BHZ, wide_BHKV)[2]
    whole_BHKK, after_BHKV = wide_BHKV[..., :key_dim], wide_BHKV[..., key_dim:]
    state_BHKV += across_devices.arriving(whole_BHKK, after_BHKV, over, times=_times)
  results = _delta_scan(w_BHZCK, u_BHZCV, k_BHZCK, decay_BHZ, state_BHKV)
  new_BHZCV, before_BHZKV, _ = results
  residuals = (w_BHZCK, k_BHZCK, decay_BHZ, before_BHZKV, new_BHZCV, whole_BHKK)
  return results, residuals


def _delta_scan(w_BHZCK, u_BHZCV, k_BHZCK, decay_BHZ, state_BHKV):
  def body(carry, z):
    state, before, new = carry
    before = _put(before, state, z)
    new_z = _at(u_BHZCV, z) - layout.product(_at(w_BHZCK, z), state, -1, -2)
    new_z = new_z.astype(u_BHZCV.dtype)
    state = _at(decay_BHZ, z)[..., None, None] * state
    state += layout.product(_at(k_BHZCK, z), new_z, -2, -2)
    return (state, before, _put(new, new_z, z)), None

  num_chunks = u_BHZCV.shape[2]
  shape = (*u_BHZCV.shape[:3], *state_BHKV.shape[2:])
  carry = (state_BHKV, jnp.zeros(shape, jnp.float32), jnp.zeros_like(u_BHZCV))
  (state_BHKV, before_BHZKV, new_BHZCV), _ = lax.scan(
    body, carry, jnp.arange(num_chunks)
  )
  return new_BHZCV, before_BHZKV, state_BHKV


def _delta_gradient(over, residuals, cotangents):
  w_BHZCK, k_BHZCK, decay_BHZ, before_BHZKV, new_BHZCV, whole_BHKK = residuals
  dnew_BHZCV, dbefore_BHZKV, dstate_BHKV = cotangents
  dtype = new_BHZCV.dtype

  def body(carry, z):
    dstate, dafter, du = carry
    dafter = _put(dafter, dstate, z)
    dnew = _at(dnew_BHZCV, z) + layout.product(_at(k_BHZCK, z), dstate, -1, -2)
    dnew = dnew.astype(dtype)
    dstate = _at(decay_BHZ, z)[..., None, None] * dstate + _at(dbefore_BHZKV, z)
    dstate -= layout.product(_at(w_BHZCK, z), dnew, -2, -2)
    return (dstate, dafter, _put(du, dnew, z)), None

  def back(dstate_BHKV):
    empty = (jnp.zeros_like(dbefore_BHZKV), jnp.zeros_like(dnew_BHZCV))
    chunks = jnp.arange(decay_BHZ.shape[2])
    return lax.scan(body, (dstate_BHKV, *empty), chunks, reverse=True)[0]

  if over:
    dstate_BHKV += across_devices.arriving(
      whole_BHKK.swapaxes(2, 3), back(dstate_BHKV)[0], over, times=_times, reverse=True
    )
  dstate_BHKV, dafter_BHZKV, du_BHZCV = back(dstate_BHKV)
  dw_BHZCK = -layout.product(du_BHZCV, before_BHZKV, -1, -1)
  dk_BHZCK = layout.product(new_BHZCV, dafter_BHZKV, -1, -1)
  ddecay_BHZ = jnp.sum(dafter_BHZKV * before_BHZKV, axis=(-2, -1))
  return (
    dw_BHZCK.astype(w_BHZCK.dtype),
    du_BHZCV,
    dk_BHZCK.astype(k_BHZCK.dtype),
    ddecay_BHZ,
    dstate_BHKV,
  )


delta.defvjp(_delta, _delta_gradient)


def _times(a_BHKK: jax.Array, b_BHKV: jax.Array) -> jax.Array:
  return jnp.matmul(a_BHKK, b_BHKV, precision=lax.Precision.HIGHEST)


def _at(z: jax.Array, chunk: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(z, chunk, 2, keepdims=False)


def _put(z: jax.Array, value: jax.Array, chunk: jax.Array) -> jax.Array:
  return lax.dynamic_update_index_in_dim(z, value, chunk, 2)
