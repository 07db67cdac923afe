"""Hadamard matrices and the product with one, in few small matrix products.

A Hadamard matrix H of order n has entries of 1 and -1 and `H H^T = n I`; divided by
sqrt(n) it is a rotation that spreads any one channel over all of them.

Sources: Sylvester's doubling for powers of two; Paley 1933, doi:10.1002/sapm1933121311,
both constructions, computed over the field of q elements for any prime power q: order
q + 1 for q = 3 mod 4, and 2 (q + 1) for q = 1 mod 4. An order n = 2^k m is the
Kronecker product of Sylvester's matrix and the smallest of Paley's that fits. Nothing
is read from a table, so orders that need other constructions (92, 116, 156, ...) are
missing.

The product with a Kronecker product is one product for each factor: the fast
Walsh-Hadamard transform with butterflies of up to 64 points, which matrix units and
caches like better than those of two. With random signs s, `diag(s) H / sqrt(n)` is the
randomized form of QuIP# (Tseng et al. 2024, arXiv:2402.04396) and QuaRot (Ashkboos et
al. 2024, arXiv:2404.00456).
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config, errors

# Points of one butterfly: a product with a matrix of at most this order.
_POINTS = 64


def hadamard_matrix(order: int) -> np.ndarray:
  """A Hadamard matrix, int8 `[order, order]`; Sylvester's for powers of two.

  Raises:
    InputError: none of this order is known here; the nearest orders are named.
  """
  # From a new array on: the factors are kept, and must stay as they are.
  return functools.reduce(np.kron, _factors(order), np.ones((1, 1), np.int8))


def exists(order: int) -> bool:
  """Whether `hadamard_matrix` has one of this order."""
  return order > 0 and _core(order) is not None


def largest_block(size: int) -> int:
  """The largest divisor of `size` that is the order of a known matrix (1 is one)."""
  return max(d for d in range(1, size + 1) if size % d == 0 and exists(d))


def transform(x: jax.Array, *, inverse: bool = False) -> jax.Array:
  """`x @ H / sqrt(n)` along the last axis, of size n, with H = `hadamard_matrix(n)`.

  Args:
    x: `[..., n]`; the product is computed in float32 at least, and has the dtype of x.
    inverse: with the transpose of H, which undoes it.

  Raises:
    InputError: no Hadamard matrix of order n is known.
  """
  order = x.shape[-1]
  wide = jnp.promote_types(x.dtype, jnp.float32)
  y = x.astype(wide) / jnp.sqrt(jnp.asarray(order, wide))
  left = 1
  for factor in _factors(order):
    points = len(factor)
    y = y.reshape(-1, left, points, order // (left * points))
    matrix = jnp.asarray(factor.T if inverse else factor, wide)
    y = jnp.einsum("tlpr,pq->tlqr", y, matrix)
    left *= points
  return y.reshape(x.shape).astype(x.dtype)


def blockwise(x: jax.Array, block: int, *, inverse: bool = False) -> jax.Array:
  """`transform` of each `block` channels of the last axis by themselves.

  Raises:
    InputError: `block` does not divide the axis, or is no order of a known matrix.
  """
  check_block(x.shape[-1], block)
  parts = x.reshape(*x.shape[:-1], -1, block)
  return transform(parts, inverse=inverse).reshape(x.shape)


def check_block(size: int, block: int) -> None:
  """Raises InputError unless blocks of `block` channels tile `size` and can rotate."""
  config.require(
    block > 0 and size % block == 0,
    f"blocks of {block} channels do not tile {size}; take a divisor of it",
  )
  _factors(block)


def random_signs(key: jax.Array, size: int) -> jax.Array:
  """Random signs s of a randomized Hadamard matrix: 1 or -1, float32 `[size]`."""
  return jax.random.rademacher(key, (size,), jnp.float32)


@functools.cache
def _factors(order: int) -> tuple[np.ndarray, ...]:
  """Matrices of at most `_POINTS` (or Paley's own) whose Kronecker product is H."""
  core = _core(order) if order > 0 else None
  if core is None:
    raise errors.InputError(_missing(order))
  doublings = (order // core).bit_length() - 1
  if order <= _POINTS:
    return (np.kron(_sylvester(doublings), _paley(core)),)
  num_factors = -(-doublings // (_POINTS.bit_length() - 1))
  shares = [
    doublings // num_factors + (i < doublings % num_factors) for i in range(num_factors)
  ]
  paley = () if core == 1 else (_paley(core),)
  return (*map(_sylvester, shares), *paley)


def _missing(order: int) -> str:
  """What to say of an order without a matrix."""
  if order <= 0:
    return f"a Hadamard matrix of order {order} makes no sense; orders are positive"
  below = next(n for n in itertools.count(order - 1, -1) if exists(n))
  above = next(n for n in itertools.count(order + 1) if exists(n))
  return (
    f"no Hadamard matrix of order {order} is known here (there are 1, 2, and 2^k times "
    f"q + 1 or 2 (q + 1) of a prime power q); the nearest are {below} and {above}, the "
    f"largest that divides it {largest_block(order)}"
  )


def _core(order: int) -> int | None:
  """The smallest order of Paley's (or 1) that is `order` over a power of two."""
  odd = order // (order & -order)
  sizes = itertools.takewhile(
    lambda m: m <= order, (odd << i for i in itertools.count())
  )
  return next((m for m in sizes if m == 1 or _field_order(m) is not None), None)


def _field_order(order: int) -> int | None:
  """The q of the construction of this order, or None."""
  if order % 4:
    return None
  if _prime_power(order - 1):  # 3 mod 4, as 4 divides the order
    return order - 1
  q = order // 2 - 1
  return q if q % 4 == 1 and _prime_power(q) else None


def _prime_power(q: int) -> tuple[int, int] | None:
  """`(p, e)` with q = p^e and p prime, or None."""
  if q < 2:
    return None
  p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
  e = 0
  while q % p == 0:
    q, e = q // p, e + 1
  return (p, e) if q == 1 else None


@functools.cache
def _sylvester(doublings: int) -> np.ndarray:
  """Sylvester's matrix of order 2^doublings."""
  two = np.array([[1, 1], [1, -1]], np.int8)
  return functools.reduce(np.kron, [two] * doublings, np.ones((1, 1), np.int8))


@functools.cache
def _paley(order: int) -> np.ndarray:
  """Paley's matrix of an order that `_field_order` knows, or `[[1]]`."""
  if order == 1:
    return np.ones((1, 1), np.int8)
  q = _field_order(order)
  # The conference matrix S: zeros on the diagonal, S S^T = q I.
  s = np.zeros((q + 1, q + 1), np.int8)
  s[0, 1:] = 1
  s[1:, 0] = 1 if q % 4 == 1 else -1
  s[1:, 1:] = _jacobsthal(q)
  eye = np.eye(q + 1, dtype=np.int8)
  if q % 4 == 3:
    return s + eye
  two = lambda rows: np.array(rows, np.int8)
  return np.kron(s, two([[1, 1], [1, -1]])) + np.kron(eye, two([[1, -1], [-1, -1]]))


def _jacobsthal(q: int) -> np.ndarray:
  """chi(a - b) for all a, b of the field of q elements: 1 for squares, else -1 (0: 0).

  Elements are polynomials over p of degree below e, written as digits to the base p.
  """
  p, e = _prime_power(q)
  base = p ** np.arange(e)
  chi = np.full(q, -1, np.int8)
  chi[0] = 0
  chi[_powers(p, e)[::2] @ base] = 1
  digits = np.arange(q)[:, None] // base % p
  return chi[(digits[:, None] - digits[None]) % p @ base]


def _powers(p: int, e: int) -> np.ndarray:
  """Powers of an element that generates all nonzero ones, as digits `[p^e - 1, e]`.

  It is x modulo a polynomial f of degree e; one after the other is tried. If the powers
  of x are all p^e - 1 nonzero polynomials, each of these has an inverse, so f makes a
  field.
  """
  one = np.eye(e, dtype=np.int64)[0]
  for low in itertools.product(range(p), repeat=e):
    tail = -np.array(low[::-1]) % p  # x^e, of f = x^e + low
    powers = [one]
    while len(powers) < p**e:
      last = powers[-1]
      shifted = np.concatenate([[0], last[:-1]])
      powers.append((shifted + last[-1] * tail) % p)
      if np.array_equal(powers[-1], one) or not powers[-1].any():
        break
    if len(powers) == p**e and np.array_equal(powers[-1], one):
      return np.stack(powers[:-1])
  raise ValueError(f"no primitive polynomial of degree {e} over {p}")
