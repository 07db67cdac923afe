"""States carried from chunk to chunk, and the gradients of that, written out.

Only what depends on the state runs token chunk after token chunk; everything else is
the caller's, for all chunks at once. Chunks are indexed where they stand: scanning over
them would move them to the front. State and decays are float32, products take the
dtype of the arrays they are given.

Letters: Z chunks of C tokens, K and V sizes of a key and of a value head.
"""

import jax
import jax.numpy as jnp
from jax import lax

from effjax.ops.recurrence import layout


@jax.custom_vjp
def linear(
  decay_BHZK: jax.Array, added_BHZKV: jax.Array, state_BHKV: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """S' = diag(decay) S + added, chunk by chunk; all float32.

  Returns:
    The state before each chunk, `[B, H, Z, K, V]`, and the one after the last.
  """
  return _linear(decay_BHZK, added_BHZKV, state_BHKV)[0]


def _linear(decay_BHZK, added_BHZKV, state_BHKV):
  before_BHZKV, state_BHKV = _linear_scan(decay_BHZK, added_BHZKV, state_BHKV)
  return (before_BHZKV, state_BHKV), (decay_BHZK, before_BHZKV)


def _linear_gradient(residuals, cotangents):
  decay_BHZK, before_BHZKV = residuals
  dbefore_BHZKV, dstate_BHKV = cotangents
  dafter_BHZKV, dstate_BHKV = _linear_scan(
    decay_BHZK, dbefore_BHZKV, dstate_BHKV, reverse=True
  )
  ddecay_BHZK = jnp.sum(dafter_BHZKV * before_BHZKV, axis=-1)
  return ddecay_BHZK, dafter_BHZKV, dstate_BHKV


linear.defvjp(_linear, _linear_gradient)


def _linear_scan(decay_BHZK, added_BHZKV, state_BHKV, *, reverse=False):
  """The states that each chunk meets, and the one after the last one met."""

  def body(carry, z):
    state, met = carry
    met = _put(met, state, z)
    return (_at(decay_BHZK, z)[..., None] * state + _at(added_BHZKV, z), met), None

  carry = (state_BHKV, jnp.zeros_like(added_BHZKV))
  chunks = jnp.arange(added_BHZKV.shape[2])
  (state_BHKV, met_BHZKV), _ = lax.scan(body, carry, chunks, reverse=reverse)
  return met_BHZKV, state_BHKV


@jax.custom_vjp
def delta(
  w_BHZCK: jax.Array,
  u_BHZCV: jax.Array,
  k_BHZCK: jax.Array,
  decay_BHZ: jax.Array,
  state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """N = U - W S and S' = decay S + K^T N, chunk by chunk.

  Args:
    w_BHZCK, u_BHZCV: what a chunk removes from its state and what it writes instead.
    k_BHZCK: keys, each times the decay to the end of its chunk.
    decay_BHZ: float32 decays over whole chunks.
    state_BHKV: float32 state before the first chunk.

  Returns:
    new_BHZCV in the dtype of u; the state before each chunk, `[B, H, Z, K, V]`, and the
    one after the last, both float32.
  """
  return _delta(w_BHZCK, u_BHZCV, k_BHZCK, decay_BHZ, state_BHKV)[0]


def _delta(w_BHZCK, u_BHZCV, k_BHZCK, decay_BHZ, state_BHKV):
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
  residuals = (w_BHZCK, k_BHZCK, decay_BHZ, before_BHZKV, new_BHZCV)
  return (new_BHZCV, before_BHZKV, state_BHKV), residuals


def _delta_gradient(residuals, cotangents):
  w_BHZCK, k_BHZCK, decay_BHZ, before_BHZKV, new_BHZCV = residuals
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

  carry = (dstate_BHKV, jnp.zeros_like(dbefore_BHZKV), jnp.zeros_like(dnew_BHZCV))
  (dstate_BHKV, dafter_BHZKV, du_BHZCV), _ = lax.scan(
    body, carry, jnp.arange(decay_BHZ.shape[2]), reverse=True
  )
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


def _at(z: jax.Array, chunk: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(z, chunk, 2, keepdims=False)


def _put(z: jax.Array, value: jax.Array, chunk: jax.Array) -> jax.Array:
  return lax.dynamic_update_index_in_dim(z, value, chunk, 2)
