"""S4D by matrix products over chunks: a convolution whose past is a state.

Gu et al. 2022, arXiv:2206.11893. The kernel of the convolution is a sum of N complex
exponentials, so a chunk of C tokens needs from all tokens before it only N complex
numbers a channel. With h the state before a chunk, and inside it,

  y_l   = sum_{s <= l} K_{l-s} x_s + 2 Re(C Ab^{l+1} h)
  h_end = Ab^C h + sum_s Ab^{C-1-s} Bb x_s,

three products whose matrices are the same for all chunks, and a short scan across the
chunks. The paper convolves by FFT instead, which gives no state, takes no packed rows,
and costs more: its kernel needs N complex exponentials for each token and channel.

Where a row holds several documents, the first product would mix them: there, the
shifted inputs are added lag by lag, with a mask. Complex numbers are pairs of real
arrays: what is stacked on an axis of size 2, or merged into one of size R, is the real
and then the imaginary part.

Letters beside the project's: Z chunks of C tokens, M = B Z chunks of all rows, I
channels, N conjugate pairs of each, R = 2N real numbers of its state.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core.config import require
from effjax.ops.recurrence import across_devices
from effjax.ops.recurrence import segments as segment_ops
from effjax.ops.ssm import pairs

DEFAULT_CHUNK = 32
# Where documents meet, the cost inside a chunk grows with its length.
PACKED_CHUNK = 16

Pair = pairs.Pair


class Tables(NamedTuple):
  """What the products of a chunk multiply by; R = 2N real numbers a state.

  Attributes:
    powers: Ab^l for l = 0 to C, a pair of `[I, C + 1, N]`.
    kernel_IC: K_l for l < C.
    feed_ICR: from the inputs of a chunk to the state after it.
    read_ICR: from the state before a chunk to its outputs.
  """

  powers: Pair
  kernel_IC: jax.Array
  feed_ICR: jax.Array
  read_ICR: jax.Array


def s4d(
  x_BLI: jax.Array,
  dt_I: jax.Array,
  a_2NI: jax.Array,
  c_2NI: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_B2NI: jax.Array | None = None,
  chunk: int = DEFAULT_CHUNK,
  over: across_devices.Over = (),
) -> tuple[jax.Array, jax.Array]:
  """h_t = Ab h_{t-1} + Bb x_t and y_t = 2 Re(C . h_t), in every channel.

  Ab = exp(dt A) and Bb = (exp(dt A) - 1) / A, the zero-order hold with B = 1. The skip
  connection D x is the caller's.

  Which form runs is decided on the device: without `segments_BL`, or if no row holds
  a second document, everything is a product of matrices; otherwise the tokens of a
  (shorter) chunk are added lag by lag. Initial states and padding change nothing here.

  Args:
    x_BLI: inputs, float32 or bfloat16; products over tokens take this dtype and
      accumulate in float32, states are float32.
    dt_I: step sizes, positive.
    a_2NI: complex rates A, of negative real part, one of each conjugate pair.
    c_2NI: complex output weights C.
    segments_BL: integer segment ids; the state is reset where the id changes. 0 is
      padding, whose outputs mean nothing (but are finite). It may stand between
      segments and at the end of a row, and the final state is that after the last token
      before it. It must not stand between two tokens of a segment nor, with a state,
      before the first token: the kernel counts positions.
    initial_state_B2NI: state before the first token, zeros by default; it belongs to
      the segment of the first token.
    chunk: tokens a chunk, any number; changes speed and memory only.
    over: mesh axes, if these are slices of sequences that are split over devices; each
      slice then starts from its own initial state plus what the ones before hand on.

  Returns:
    y_BLI in the dtype of x and the float32 state after the last token, `[B, 2, N, I]`.

  Raises:
    InputError: shapes that do not fit, or a chunk below 1.
  """
  check_shapes(x_BLI, dt_I, a_2NI, c_2NI, initial_state_B2NI)
  require(chunk >= 1, f"S4D's chunk must be at least 1 token, not {chunk}")
  num_rows, length, _ = x_BLI.shape
  dt_I, a_2NI, c_2NI = (z.astype(jnp.float32) for z in (dt_I, a_2NI, c_2NI))
  if initial_state_B2NI is None:
    initial_state_B2NI = jnp.zeros((num_rows, *a_2NI.shape))
  arrays = (x_BLI, dt_I, a_2NI, c_2NI, initial_state_B2NI.astype(jnp.float32))
  whole = functools.partial(_chunked, chunk=min(chunk, length), over=over)
  if segments_BL is None:
    last_B = jnp.full((num_rows,), length - 1)
    return whole(*arrays, last_B, None)

  x_BLI = jnp.where(segments_BL[..., None] != 0, x_BLI, 0)
  index_BL = jnp.where(segments_BL != 0, jnp.arange(length)[None], -1)
  document_BL = segment_ops.documents(segments_BL, over)
  packed = functools.partial(
    _chunked, chunk=min(chunk, PACKED_CHUNK, length), over=over
  )
  several = jnp.any(document_BL > 0)
  return lax.cond(
    across_devices.anywhere(several) if over else several,
    # Computed again for the gradient: both branches would keep what they need, and the
    # one not taken as much as the other.
    jax.checkpoint(packed),
    lambda *args: whole(*args[:-1], None),
    *(x_BLI, *arrays[1:]),
    jnp.max(index_BL, axis=1),
    document_BL,
  )


def check_shapes(
  x_BLI: jax.Array,
  dt_I: jax.Array,
  a_2NI: jax.Array,
  c_2NI: jax.Array,
  state_B2NI: jax.Array | None,
) -> None:
  """Raises InputError unless the arguments of `s4d` fit each other."""
  num_rows, length, channels = x_BLI.shape
  require(length > 0, "S4D needs at least one token")
  expected = {
    "dt": (dt_I.shape, (channels,)),
    "a": (a_2NI.shape, (2, a_2NI.shape[1], channels)),
    "c": (c_2NI.shape, a_2NI.shape),
  }
  if state_B2NI is not None:
    expected["initial_state"] = (state_B2NI.shape, (num_rows, *a_2NI.shape))
  for name, (got, wanted) in expected.items():
    require(got == wanted, f"S4D's {name} has shape {got}, the others need {wanted}")


def discretize(dt_I: jax.Array, a_2NI: jax.Array) -> tuple[Pair, Pair]:
  """Ab = exp(dt A) and Bb = (exp(dt A) - 1) / A, as pairs of `[N, I]`.

  The difference is not taken of rounded exponentials: at small dt A little but
  rounding would remain.
  """
  exponent_2NI = dt_I[None, None, :] * a_2NI
  ab = pairs.exp(exponent_2NI)
  real_NI, imag_NI = exponent_2NI
  less_one_NI = jnp.expm1(real_NI) * jnp.cos(imag_NI) - 2 * jnp.sin(imag_NI / 2) ** 2
  square_NI = jnp.sum(a_2NI**2, axis=0)
  inverse = a_2NI[0] / square_NI, -a_2NI[1] / square_NI
  return ab, pairs.multiply((less_one_NI, ab[1]), inverse)


def _chunked(
  x_BLI: jax.Array,
  dt_I: jax.Array,
  a_2NI: jax.Array,
  c_2NI: jax.Array,
  state_B2NI: jax.Array,
  last_B: jax.Array,
  document_BL: jax.Array | None,
  *,
  chunk: int,
  over: across_devices.Over,
) -> tuple[jax.Array, jax.Array]:
  """`s4d`; last_B is the last token of each row, -1 in a row without any."""
  num_rows, length, channels = x_BLI.shape
  tables = _tables(dt_I, a_2NI, c_2NI, chunk)
  x_BZCI = _split(x_BLI, chunk)
  num_chunks = x_BZCI.shape[1]
  # The document of the state before a chunk is that of the token before it.
  document_BZC = before_BZ = None
  fed_BZCI = x_BZCI
  keep_ZB = jnp.ones((num_chunks, num_rows))
  if document_BL is not None:
    document_BZC = _split(document_BL, chunk, mode="edge")
    before_BZ = jnp.pad(document_BZC[:, :-1, -1], ((0, 0), (1, 0)))
    ending_BZ = document_BZC[:, :, -1]
    fed_BZCI = jnp.where((document_BZC == ending_BZ[..., None])[..., None], x_BZCI, 0)
    keep_ZB = (before_BZ == ending_BZ).astype(jnp.float32).T

  added_IMR = _product(_by_channel(fed_BZCI), tables.feed_ICR)
  added_IBZR = added_IMR.reshape(channels, num_rows, num_chunks, -1)
  state_IBR = jnp.moveaxis(state_B2NI.reshape(num_rows, -1, channels), 2, 0)
  before_IBZR = _states(added_IBZR, tables.powers, keep_ZB, state_IBR)
  final_B2NI = _state_after(last_B, tables, x_BZCI, before_IBZR, document_BZC)
  final_B2NI = jnp.where(last_B[:, None, None, None] >= 0, final_B2NI, state_B2NI)
  if over:
    before_IBZR, final_B2NI = _joined(
      before_IBZR, final_B2NI, last_B, tables.powers, document_BZC, over
    )
  before_IMR = before_IBZR.reshape(added_IMR.shape).astype(x_BLI.dtype)
  y_IMC = _product(before_IMR, tables.read_ICR.swapaxes(1, 2))
  if document_BZC is None:
    y_IMC += _product(_by_channel(x_BZCI), _toeplitz(tables.kernel_IC))
    y_BZCI = jnp.moveaxis(y_IMC, 0, 2).reshape(x_BZCI.shape)
  else:
    y_BZCI = jnp.moveaxis(y_IMC, 0, 2).reshape(x_BZCI.shape)
    reads_BZC = document_BZC == before_BZ[..., None]
    y_BZCI = jnp.where(reads_BZC[..., None], y_BZCI, 0)
    y_BZCI += _lags(x_BZCI, tables.kernel_IC, document_BZC)
  y_BLI = y_BZCI.reshape(num_rows, -1, channels)[:, :length]
  return y_BLI.astype(x_BLI.dtype), final_B2NI


def _tables(dt_I: jax.Array, a_2NI: jax.Array, c_2NI: jax.Array, chunk: int) -> Tables:
  ab, bb = (pairs.each(jnp.transpose, z) for z in discretize(dt_I, a_2NI))
  one = jnp.ones_like(ab[0]), jnp.zeros_like(ab[0])
  powers = pairs.geometric(one, ab, chunk + 1)
  fed_ICR = jnp.concatenate(pairs.geometric(bb, ab, chunk), axis=-1)
  c = 2 * c_2NI[0].T[:, None], 2 * c_2NI[1].T[:, None]
  read = pairs.multiply(pairs.each(lambda z: z[:, 1:], powers), c)
  kernel_IC = jnp.einsum(
    "icr,ir->ic",
    fed_ICR,
    jnp.concatenate([c[0], -c[1]], axis=-1)[:, 0],
    precision=lax.Precision.HIGHEST,
  )
  return Tables(
    powers=powers,
    kernel_IC=kernel_IC,
    feed_ICR=fed_ICR[:, ::-1],
    read_ICR=jnp.concatenate([read[0], -read[1]], axis=-1),
  )


def _states(
  added_IBZR: jax.Array, powers: Pair, keep_ZB: jax.Array, state_IBR: jax.Array
) -> jax.Array:
  """The state before each chunk, of the inputs' size."""
  decay = pairs.each(lambda z: z[:, -1:], powers)

  def body(h_IBR, inputs):
    added_IBR, keep_B = inputs
    kept_IBR = jnp.where(keep_B[None, :, None] > 0, h_IBR, 0.0)
    decayed = pairs.multiply(jnp.split(kept_IBR, 2, axis=-1), decay)
    return jnp.concatenate(decayed, axis=-1) + added_IBR, h_IBR

  added_ZIBR = jnp.moveaxis(added_IBZR, 2, 0)
  _, before_ZIBR = lax.scan(body, state_IBR, (added_ZIBR, keep_ZB))
  return jnp.moveaxis(before_ZIBR, 0, 2)


def _toeplitz(kernel_IC: jax.Array) -> jax.Array:
  """T[s, l] = K_{l-s}, 0 for l < s, of each channel; `[I, C, C]`.

  A row of 2C repeated and cut one element short moves on by one each time.
  """
  channels, chunk = kernel_IC.shape
  padded_IC = jnp.pad(kernel_IC, ((0, 0), (0, chunk)))
  repeated_IC = jnp.tile(padded_IC, (1, chunk))[:, : chunk * (2 * chunk - 1)]
  return repeated_IC.reshape(channels, chunk, -1)[:, :, :chunk]


def _lags(
  x_BZCI: jax.Array, kernel_IC: jax.Array, document_BZC: jax.Array
) -> jax.Array:
  """sum_j K_j x_{l-j} within each chunk, over tokens of the document of l."""
  chunk = kernel_IC.shape[1]
  y_BZCI = jnp.zeros(x_BZCI.shape, jnp.float32)
  for lag in range(chunk):
    same = document_BZC[:, :, lag:] == document_BZC[:, :, : chunk - lag]
    term = jnp.where(same[..., None], x_BZCI[:, :, : chunk - lag], 0)
    term = term * kernel_IC[:, lag][None, None, None, :]
    y_BZCI += jnp.pad(term, ((0, 0), (0, 0), (lag, 0), (0, 0)))
  return y_BZCI


def _state_after(
  last_B: jax.Array,
  tables: Tables,
  x_BZCI: jax.Array,
  before_IBZR: jax.Array,
  document_BZC: jax.Array | None,
) -> jax.Array:
  """The state after the token last_B of each row (at least 0), `[B, 2, N, I]`.

  The inputs of its chunk move up until that token is the last of them.
  """
  num_rows, _, chunk, channels = x_BZCI.shape
  rows_B = jnp.arange(num_rows)
  z_B, place_B = jnp.divmod(jnp.maximum(last_B, 0), chunk)
  source_BC = jnp.arange(chunk)[None] - (chunk - 1 - place_B)[:, None]
  used_BC = source_BC >= 0
  source_BC = jnp.maximum(source_BC, 0)
  before_BIR = jnp.moveaxis(before_IBZR, 0, 2)[rows_B, z_B]
  if document_BZC is not None:
    document_BC = document_BZC[rows_B, z_B]
    own_B = document_BC[rows_B, place_B]
    used_BC &= jnp.take_along_axis(document_BC, source_BC, axis=1) == own_B[:, None]
    # Documents are numbered in order: a chunk that starts in this one continues the
    # state before it, unless the document starts right there.
    previous_B = jnp.where(
      z_B > 0, document_BZC[rows_B, jnp.maximum(z_B - 1, 0), -1], 0
    )
    continues_B = (previous_B == own_B)[:, None, None]
    before_BIR = jnp.where(continues_B, before_BIR, 0.0)
  x_BCI = x_BZCI[rows_B, z_B][rows_B[:, None], source_BC]
  x_BCI = jnp.where(used_BC[..., None], x_BCI, 0).astype(jnp.float32)
  added_BIR = jnp.einsum("bci,icr->bir", x_BCI, tables.feed_ICR)
  added_B2NI = added_BIR.reshape(num_rows, channels, 2, -1).transpose(0, 2, 3, 1)
  before_B2NI = before_BIR.reshape(num_rows, channels, 2, -1).transpose(0, 2, 3, 1)
  decay = pairs.each(lambda z: z[:, place_B + 1].transpose(1, 2, 0), tables.powers)
  decayed = pairs.multiply((before_B2NI[:, 0], before_B2NI[:, 1]), decay)
  return jnp.stack(decayed, axis=1) + added_B2NI


def _joined(
  before_IBZR: jax.Array,
  final_B2NI: jax.Array,
  last_B: jax.Array,
  powers: Pair,
  document_BZC: jax.Array | None,
  over: across_devices.Over,
) -> tuple[jax.Array, jax.Array]:
  """Adds what the slices before hand on to the states of a slice.

  What arrives is Ab^t times as much t tokens later, up to where a document starts.
  """
  num_rows, num_chunks = before_IBZR.shape[1:3]
  start, chunk = (pairs.each(lambda z, i=i: z[:, i], powers) for i in (0, -1))
  across = pairs.geometric(start, chunk, num_chunks + 1)
  z_B, rest_B = jnp.divmod(last_B + 1, powers[0].shape[1] - 1)
  over_chunks = pairs.each(lambda z: z[:, z_B], across)
  rest = pairs.each(lambda z: z[:, rest_B], powers)
  decay_2IBN = jnp.stack(pairs.multiply(over_chunks, rest))
  reached_BZ = jnp.ones((num_rows, num_chunks), bool)
  if document_BZC is not None:
    document_BL = document_BZC.reshape(num_rows, -1)
    last_B1 = jnp.maximum(last_B, 0)[:, None]
    kept_B1 = jnp.take_along_axis(document_BL, last_B1, axis=1) == 0
    decay_2IBN = jnp.where(kept_B1[None, None], decay_2IBN, 0.0)
    reached_BZ = jnp.pad(document_BZC[:, :-1, -1], ((0, 0), (1, 0))) == 0

  times = lambda a, b: jnp.stack(pairs.multiply(a, b))
  final_2IBN = final_B2NI.transpose(1, 3, 0, 2)
  state_2IBN = across_devices.arriving(decay_2IBN, final_2IBN, over, times=times)
  met = pairs.multiply(
    pairs.each(lambda z: z[:, None, :-1], across), state_2IBN[:, :, :, None]
  )
  met_IBZR = jnp.where(reached_BZ[None, ..., None], jnp.concatenate(met, axis=-1), 0.0)
  final_2IBN += times(decay_2IBN, state_2IBN)
  return before_IBZR + met_IBZR, final_2IBN.transpose(2, 0, 3, 1)


def _split(z_BLs: jax.Array, chunk: int, mode: str = "constant") -> jax.Array:
  """[B, L, ...] -> [B, Z, C, ...], filled at the end to a multiple of the chunk."""
  num_rows, length, *rest = z_BLs.shape
  missing = -length % chunk
  if missing:
    widths = [(0, 0), (0, missing)] + [(0, 0)] * len(rest)
    z_BLs = jnp.pad(z_BLs, widths, mode=mode)
  return z_BLs.reshape(num_rows, -1, chunk, *rest)


def _by_channel(x_BZCI: jax.Array) -> jax.Array:
  """[B, Z, C, I] -> [I, M, C]."""
  num_rows, num_chunks, chunk, channels = x_BZCI.shape
  return jnp.moveaxis(x_BZCI, 3, 0).reshape(channels, num_rows * num_chunks, chunk)


def _product(a_IMs: jax.Array, b_Ist: jax.Array) -> jax.Array:
  """A product for each channel, in the dtype of the first and summed in float32."""
  return lax.dot_general(
    a_IMs,
    b_Ist.astype(a_IMs.dtype),
    (((2,), (1,)), ((0,), (0,))),
    preferred_element_type=jnp.float32,
  )
