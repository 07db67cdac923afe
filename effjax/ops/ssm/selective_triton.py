"""The selective scan of Mamba-1 as Pallas kernels for GPUs, written for Triton.

Gu and Dao 2023, arXiv:2312.00752, section 3.3.2: the states of a block of channels stay
in registers while a program goes through the tokens, and only those before each chunk
are written out. The gradient's program goes through the chunks from the last to the
first, computes the states of one again into a buffer, and walks back over it. Of the
gradients of B and C, which all channels share, each program writes its own part.

Differentiable once, in reverse: the gradient is a kernel that has none.

Measured on an H200 by experiments/gpu_kernels (JAX 0.11.2, 4,096 tokens, 16 states):
512 channels of one row take 2.1 ms forward and 7.0 with the gradient, where the loops
of `selective` take 76 and 177; eight rows 3.7 and 8.5 ms. Outputs and gradients are
within 4e-7 of those of `selective`, in norm.

Letters beside the project's: Z chunks of C tokens, K blocks of channels, N states of
each of I channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from effjax.core.config import require
from effjax.ops.ssm import selective

# The fastest of six choices there: channels of one program, tokens of a chunk, warps.
_CHANNELS, _CHUNK, _WARPS = 16, 32, 1


def selective_scan(
  x_BLI: jax.Array,
  dt_BLI: jax.Array,
  a_NI: jax.Array,
  b_BLN: jax.Array,
  c_BLN: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BNI: jax.Array | None = None,
  chunk: int = selective.DEFAULT_CHUNK,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """See `selective.selective_scan`, whose chunks are not those of the kernels.

  Args:
    x_BLI, dt_BLI, a_NI, b_BLN, c_BLN: as there.
    segments_BL, initial_state_BNI: as there.
    chunk: checked only.
    interpret: runs on any platform, slowly, for tests.

  Raises:
    InputError: as there.
  """
  selective.check_shapes(x_BLI, dt_BLI, a_NI, b_BLN, c_BLN, initial_state_BNI)
  require(chunk >= 1, f"the scan's chunk must be at least 1 token, not {chunk}")
  dt_BLI, reset_BL = selective.mask(dt_BLI, segments_BL)
  keep_BL = jnp.ones(x_BLI.shape[:2])
  if reset_BL is not None:
    keep_BL = jnp.where(reset_BL, 0.0, 1.0)
  if initial_state_BNI is None:
    initial_state_BNI = jnp.zeros((x_BLI.shape[0], *a_NI.shape))
  floats = (a.astype(jnp.float32) for a in (x_BLI, dt_BLI, a_NI, b_BLN, c_BLN))
  state_BNI = initial_state_BNI.astype(jnp.float32)
  y_BLI, state_BNI = _scan(*floats, keep_BL, state_BNI, interpret)
  return y_BLI.astype(x_BLI.dtype), state_BNI


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(
  x_BLI: jax.Array,
  dt_BLI: jax.Array,
  a_NI: jax.Array,
  b_BLN: jax.Array,
  c_BLN: jax.Array,
  keep_BL: jax.Array,
  state_BNI: jax.Array,
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """`selective_scan`; keep is 0 where a document starts, 1 elsewhere."""
  outputs, _ = _forward(
    x_BLI, dt_BLI, a_NI, b_BLN, c_BLN, keep_BL, state_BNI, interpret
  )
  return outputs


def _forward(
  x_BLI: jax.Array,
  dt_BLI: jax.Array,
  a_NI: jax.Array,
  b_BLN: jax.Array,
  c_BLN: jax.Array,
  keep_BL: jax.Array,
  state_BNI: jax.Array,
  interpret: bool,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
  """Outputs, and what the gradient needs: the arguments and states before chunks."""
  num_rows, length, channels = x_BLI.shape
  args = (x_BLI, dt_BLI, a_NI, b_BLN, c_BLN, keep_BL, state_BNI)
  x, dt, a, b, c, keep, state = _padded(args)
  _, padded, width = x.shape
  num_states, num_chunks = a.shape[0], padded // _CHUNK

  def kernel(x_ref, dt_ref, a_ref, b_ref, c_ref, keep_ref, state_ref, *out_refs):
    y_ref, before_ref, end_ref = out_refs
    row, at = pl.program_id(0), pl.ds(pl.program_id(1) * _CHANNELS, _CHANNELS)
    a_NI = a_ref[:, at]

    def chunk(z, h_NI):
      before_ref[row, z, :, at] = h_NI

      def token(i, h_NI):
        t = z * _CHUNK + i
        x_I, dt_I = x_ref[row, t, at], dt_ref[row, t, at]
        decay_NI = jnp.exp(dt_I[None] * a_NI) * keep_ref[row, t]
        h_NI = decay_NI * h_NI + b_ref[row, t, :][:, None] * (dt_I * x_I)[None]
        y_ref[row, t, at] = jnp.sum(h_NI * c_ref[row, t, :][:, None], axis=0)
        return h_NI

      return jax.lax.fori_loop(0, _CHUNK, token, h_NI)

    end_ref[row, :, at] = jax.lax.fori_loop(0, num_chunks, chunk, state_ref[row, :, at])

  shapes = ((padded, width), (num_chunks, num_states, width), (num_states, width))
  y, before, end = pl.pallas_call(
    kernel,
    grid=(num_rows, width // _CHANNELS),
    out_shape=[jax.ShapeDtypeStruct((num_rows, *s), jnp.float32) for s in shapes],
    compiler_params=pltriton.CompilerParams(num_warps=_WARPS),
    interpret=interpret,
    name="selective_scan",
  )(x, dt, a, b, c, keep, state)
  outputs = (y[:, :length, :channels], end[:, : a_NI.shape[0], :channels])
  return outputs, (*args, before)


def _backward(
  interpret: bool, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
  """Gradients of all arguments; d before a name is the gradient of what it names."""
  *args, before = residuals
  dy_BLI, dstate_BNI = cotangents
  num_rows, length, channels = dy_BLI.shape
  states = args[2].shape[0]
  x, dt, a, b, c, keep, _ = _padded(tuple(args))
  _, padded, width = x.shape
  num_states, num_chunks, num_blocks = a.shape[0], padded // _CHUNK, width // _CHANNELS
  dy = _pad(dy_BLI, (0, padded - length, width - channels))
  dstate = _pad(dstate_BNI, (0, num_states - states, width - channels))

  def kernel(*refs):
    x_ref, dt_ref, a_ref, b_ref, c_ref, keep_ref = refs[:6]
    before_ref, dy_ref, dend_ref = refs[6:9]
    dx_ref, ddt_ref, da_ref, db_ref, dc_ref, dstate_ref, held_ref = refs[9:]
    row, block = pl.program_id(0), pl.program_id(1)
    at = pl.ds(block * _CHANNELS, _CHANNELS)
    a_NI = a_ref[:, at]

    def read(t):
      x_I, dt_I = x_ref[row, t, at], dt_ref[row, t, at]
      decay_NI = jnp.exp(dt_I[None] * a_NI) * keep_ref[row, t]
      return x_I, dt_I, decay_NI, b_ref[row, t, :][:, None]

    def chunk(i, carry):
      z = num_chunks - 1 - i

      def again(i, h_NI):
        held_ref[row, block, i] = h_NI
        x_I, dt_I, decay_NI, b_N1 = read(z * _CHUNK + i)
        return decay_NI * h_NI + b_N1 * (dt_I * x_I)[None]

      jax.lax.fori_loop(0, _CHUNK, again, before_ref[row, z, :, at])

      def token(i, carry):
        dafter_NI, da_NI = carry
        place = _CHUNK - 1 - i
        t = z * _CHUNK + place
        x_I, dt_I, decay_NI, b_N1 = read(t)
        h_NI, dy_I = held_ref[row, block, place], dy_ref[row, t, at]
        input_1I = (dt_I * x_I)[None]
        after_NI = decay_NI * h_NI + b_N1 * input_1I
        dh_NI = dafter_NI + c_ref[row, t, :][:, None] * dy_I[None]
        dlog_NI = dh_NI * h_NI * decay_NI
        dinput_I = jnp.sum(dh_NI * b_N1, axis=0)
        dx_ref[row, t, at] = dinput_I * dt_I
        ddt_ref[row, t, at] = jnp.sum(dlog_NI * a_NI, axis=0) + dinput_I * x_I
        db_ref[block, row, t] = jnp.sum(dh_NI * input_1I, axis=1)
        dc_ref[block, row, t] = jnp.sum(after_NI * dy_I[None], axis=1)
        return decay_NI * dh_NI, da_NI + dlog_NI * dt_I[None]

      return jax.lax.fori_loop(0, _CHUNK, token, carry)

    carry = (dend_ref[row, :, at], jnp.zeros_like(a_NI))
    dstate_NI, da_NI = jax.lax.fori_loop(0, num_chunks, chunk, carry)
    dstate_ref[row, :, at] = dstate_NI
    da_ref[row, :, at] = da_NI

  tokens, whole = (num_rows, padded, width), (num_rows, num_states, width)
  parts = (num_blocks, num_rows, padded, num_states)
  held = (num_rows, num_blocks, _CHUNK, num_states, _CHANNELS)
  dx, ddt, da, db, dc, dstart, _ = pl.pallas_call(
    kernel,
    grid=(num_rows, num_blocks),
    out_shape=[
      jax.ShapeDtypeStruct(shape, jnp.float32)
      for shape in (tokens, tokens, whole, parts, parts, whole, held)
    ],
    compiler_params=pltriton.CompilerParams(num_warps=_WARPS),
    interpret=interpret,
    name="selective_scan_gradient",
  )(x, dt, a, b, c, keep, before, dy, dstate)
  by_token = lambda g: g[:, :length, :channels]
  shared = lambda g: jnp.sum(g, axis=0)[:, :length, :states]
  return (
    by_token(dx),
    by_token(ddt),
    jnp.sum(da, axis=0)[:states, :channels],
    shared(db),
    shared(dc),
    None,
    dstart[:, :states, :channels],
  )


_scan.defvjp(_forward, _backward)


def _padded(args: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """Whole chunks, whole blocks of channels, and a power of two of states.

  Zeros do nothing: as step sizes they change no state, as B and C they read none.
  """
  x_BLI, dt_BLI, a_NI, b_BLN, c_BLN, keep_BL, state_BNI = args
  _, length, channels = x_BLI.shape
  more_L, more_I = -length % _CHUNK, -channels % _CHANNELS
  more_N = pl.next_power_of_2(a_NI.shape[0]) - a_NI.shape[0]
  return (
    _pad(x_BLI, (0, more_L, more_I)),
    _pad(dt_BLI, (0, more_L, more_I)),
    _pad(a_NI, (more_N, more_I)),
    _pad(b_BLN, (0, more_L, more_N)),
    _pad(c_BLN, (0, more_L, more_N)),
    jnp.pad(keep_BL, ((0, 0), (0, more_L)), constant_values=1.0),
    _pad(state_BNI, (0, more_N, more_I)),
  )


def _pad(x: jax.Array, more: tuple[int, ...]) -> jax.Array:
  """Zeros behind the end of each axis."""
  return jnp.pad(x, [(0, n) for n in more]) if any(more) else x
