"""Lower triangular matrices over the tokens of a chunk, built by halves.

Over 2b tokens such a matrix is that of the first half, that of the second half, and
between them one new quarter: later tokens by earlier ones. From single tokens to the
whole chunk that makes log2(C) steps of ever larger products.

Decays come out exact this way. From a token s of the first half to a token l of the
second, the decay is the one from s to the middle times the one from the middle to l,
both at most 1: nothing overflows, and no large running sums are subtracted, in the
forms or in their gradients. It is the secondary chunking of Yang et al. 2023,
arXiv:2312.06635, section 4.3, carried on to blocks of one token.

Letters: n blocks of b tokens, n b = C tokens a chunk (a power of two).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.ops.recurrence import layout

# Blocks of 1 and 2 tokens are multiplied elementwise: there a batch of matrix products
# costs more in calls than in arithmetic.
_SMALLEST_PRODUCT = 4
# exp(-128) is 0 in float32, so the clip changes no decay; and up to 256 tokens a chunk
# the coarse sums stay below 2^24 steps, where float32 is exact.
_LOWEST_LOG_DECAY = -128.0
_COARSE_STEPS = 512.0


def decayed_products(
  q: jax.Array, k: jax.Array, factor: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Products of queries and keys through per-channel decays.

  Args:
    q, k: float32 `[..., Z, C, K]`.
    factor: float32 `[..., Z, C, K]`, in 0 to 1: what a memory is multiplied by at each
      token, before that token's own key is added.
    dtype: of the operands of large products; sums are in float32.

  Returns:
    `[..., Z, C, C]`: sum_k q[l, k] k[s, k] prod_{s < t <= l} factor[t, k], 0 for s > l;
    q times the decay from before the chunk up to and with each token; k times the decay
    from after each token to the end of the chunk; `[..., Z, K]`: the decay over it.
  """
  *lead, _, tokens, size = q.shape
  # Blocks of all chunks on one axis, and below no sums over products of more axes: with
  # seven axes, the gradients of such sums crash XLA's CPU backend.
  q, k, factor = (z.reshape(*lead, -1, 1, size) for z in (q, k, factor))
  scores = jnp.sum(q * k, axis=-1)[..., None]
  # First halves need no decay from the block's start, second halves none to its end.
  q = q * factor
  while scores.shape[-1] < tokens:
    q_first, q_second = _halves(q)
    k_first, k_second = _halves(k)
    first, second = _halves(factor)
    new = _scores(q_second, k_first, dtype)
    scores = _join(*_halves(scores), new)
    q = jnp.concatenate([q_first, q_second * first], axis=-2)
    k = jnp.concatenate([k_first * second, k_second], axis=-2)
    factor = first * second
  return scores, q, k, factor[..., 0, :]


def decay_matrix(
  log_decay: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Decays that all channels of a head share.

  Args:
    log_decay: float32 `[..., C]`, at most 0.

  Returns:
    The decay from token s to token l, `[..., C, C]`, 0 for s > l; from before the chunk
    up to and with each token, `[..., C]`; from after each token to the end, `[..., C]`;
    over the chunk, `[...]`.
  """
  # Running sums in two parts, of which the coarse one is exact (see `decay.py`).
  log_decay = jnp.maximum(log_decay, _LOWEST_LOG_DECAY)
  coarse = jnp.round(log_decay * _COARSE_STEPS) / _COARSE_STEPS
  coarse, fine = _running_sum(coarse), _running_sum(log_decay - coarse)
  between = lambda z: z[..., :, None] - z[..., None, :]
  tokens = log_decay.shape[-1]
  past = np.tril(np.ones((tokens, tokens), bool))
  past = jnp.expand_dims(past, tuple(range(log_decay.ndim - 1)))
  # Masked before exp: the differences above the diagonal are positive and overflow.
  within = jnp.exp(jnp.where(past, between(coarse) + between(fine), -jnp.inf))
  start = jnp.exp(coarse + fine)
  end = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
  return within, start, end, start[..., -1]


def _running_sum(z: jax.Array) -> jax.Array:
  """Sums up to and with each token, as a product: XLA would repeat a cumulative sum."""
  ones = np.tril(np.ones((z.shape[-1],) * 2, np.float32))
  return jnp.matmul(z, ones.T, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def solve(lower: jax.Array, rhs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """Solves (I + lower) x = rhs through the inverse matrix.

  Args:
    lower: float32 `[..., Z, C, C]`; only what is below its diagonal counts.
    rhs: right-hand sides `[..., Z, C, X]`, all with one matrix.

  Returns:
    The solutions, float32.
  """
  return _solve(lower, rhs)[0]


def _solve(lower, rhs):
  inverse = unit_inverse(lower)
  x = tuple(layout.product(inverse, z, -1, -2) for z in rhs)
  # Empty arrays remember the dtypes of the right-hand sides.
  return x, (inverse, x, tuple(z[..., :0] for z in rhs))


def _solve_gradient(residuals, cotangents):
  inverse, x, rhs = residuals
  drhs = tuple(layout.product(inverse, dz, -2, -2) for dz in cotangents)
  pairs = zip(drhs, x, strict=True)
  dlower = -sum(layout.product(dz, z, -1, -1) for dz, z in pairs)
  drhs = tuple(dz.astype(z.dtype) for dz, z in zip(drhs, rhs, strict=True))
  return _strictly_lower(dlower), drhs


solve.defvjp(_solve, _solve_gradient)


def unit_inverse(lower: jax.Array) -> jax.Array:
  """(I + lower)^-1 for what is below the diagonal of `lower`, `[..., Z, C, C]`.

  By halves, [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]], which is as stable
  as substitution. The product (I - N)(I + N^2)(I + N^4) ... is not: for equal keys the
  powers of N grow like binomial coefficients and cancel.
  """
  quarters, blocks = [], lower
  while blocks.shape[-1] > 1:
    half = blocks.shape[-1] // 2
    quarters.append(blocks[..., half:, :half])
    pairs = jnp.stack([blocks[..., :half, :half], blocks[..., half:, half:]], axis=-3)
    blocks = pairs.reshape(*lower.shape[:-3], -1, half, half)
  inverse = jnp.ones_like(blocks)
  for quarter in reversed(quarters):
    first, second = _halves(inverse)
    new = -_matmul(_matmul(second, quarter), first)
    inverse = _join(first, second, new)
  return inverse


def _halves(z: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[..., n, b, X] -> first and second halves of twice as large blocks."""
  *lead, blocks, tokens, size = z.shape
  first, second = lax.split(z.reshape(*lead, blocks // 2, 2, tokens, size), (1, 1), -3)
  return first[..., 0, :, :], second[..., 0, :, :]


def _join(first: jax.Array, second: jax.Array, new: jax.Array) -> jax.Array:
  """[[first, 0], [new, second]]."""
  upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
  return jnp.concatenate([upper, jnp.concatenate([new, second], axis=-1)], axis=-2)


def _scores(q: jax.Array, k: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Products q k^T of blocks, float32."""
  tokens = q.shape[-2]
  if tokens >= _SMALLEST_PRODUCT:
    return layout.product(q.astype(dtype), k.astype(dtype), -1, -1)
  equal = jnp.sum(q * k, axis=-1)[..., None]
  if tokens == 1:
    return equal
  other = jnp.sum(q * jnp.flip(k, axis=-2), axis=-1)[..., None]
  diagonal = jnp.expand_dims(np.eye(2, dtype=bool), tuple(range(q.ndim - 2)))
  return jnp.where(diagonal, equal, other)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """Products a b of square blocks in full float32."""
  size = a.shape[-1]
  if size < _SMALLEST_PRODUCT:
    return sum(a[..., :, i : i + 1] * b[..., i : i + 1, :] for i in range(size))
  return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _strictly_lower(z: jax.Array) -> jax.Array:
  tokens = z.shape[-1]
  below = np.tril(np.ones((tokens, tokens), bool), -1)
  return jnp.where(jnp.expand_dims(below, tuple(range(z.ndim - 2))), z, 0.0)
