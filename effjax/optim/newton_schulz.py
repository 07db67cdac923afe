"""Nearly orthogonal factors of many matrices at once, by products alone.

Letters: M and N are the shorter and the longer side of a matrix.
"""

import jax
import jax.numpy as jnp

# Slope at zero as steep as the iteration tolerates: singular values end near one, not
# at one (Jordan et al. 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(
  x: jax.Array,
  num_steps: int = 5,
  dtype: jax.typing.DTypeLike = jnp.float32,
  epsilon: float = 1e-7,
) -> jax.Array:
  """Replaces the singular values of each matrix by values near 1.

  With X = U S V^T this returns about U V^T, by `num_steps` times
  X <- a X + (b A + c A^2) X, A = X X^T, from X / ||X||_F.

  Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon). Deviations: the
  Frobenius norm is taken in float32 whatever `dtype` is; in float32, long matrices are
  iterated through their Gram matrix (the same polynomial with fewer products).

  Args:
    x: `[..., in, out]`, any float dtype; each trailing matrix is on its own.
    num_steps: iterations; five take the singular values of a random matrix to about
      0.7 to 1.2.
    dtype: of the products. float32 is multiplied exactly as such on every platform.
    epsilon: added to the norm, so that a zero matrix stays zero.

  Returns:
    An array of the shape of `x`, float32.
  """
  dtype = jnp.dtype(dtype)
  x = x.astype(jnp.float32)
  x /= jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + epsilon
  tall = x.shape[-2] > x.shape[-1]
  x = (x.mT if tall else x).astype(dtype)
  if dtype == jnp.float32 and _gram_is_cheaper(*x.shape[-2:], num_steps):
    x = _iterate_gram(x, num_steps)
  else:
    x = _iterate(x, num_steps)
  return (x.mT if tall else x).astype(jnp.float32)


def _iterate(x_MN: jax.Array, num_steps: int) -> jax.Array:
  a, b, c = QUINTIC
  for _ in range(num_steps):
    gram_MM = _matmul(x_MN, x_MN.mT)
    x_MN = a * x_MN + _matmul(b * gram_MM + c * _matmul(gram_MM, gram_MM), x_MN)
  return x_MN


def _iterate_gram(x_MN: jax.Array, num_steps: int) -> jax.Array:
  """The same polynomial, with X touched only at the start and at the end.

  One step multiplies X by P = a I + b A + c A^2, which commutes with A, so A becomes
  P A P and the product of all P is applied once. Rounding grows by up to a^2 a step:
  in float32 the result is off by a few 1e-4 of its norm, far less than the iteration
  itself leaves; in bfloat16 it would be lost.
  """
  a, b, c = QUINTIC
  gram_MM = _matmul(x_MN, x_MN.mT)
  a_MM = a * jnp.eye(x_MN.shape[-2], dtype=x_MN.dtype)
  total_MM = None
  for step in range(num_steps):
    cubic_MM = b * gram_MM + c * _matmul(gram_MM, gram_MM)
    p_MM = jnp.broadcast_to(a_MM, gram_MM.shape) + cubic_MM
    total_MM = p_MM if total_MM is None else _matmul(p_MM, total_MM)
    if step < num_steps - 1:
      gram_MM = _matmul(_matmul(p_MM, gram_MM), p_MM)
  return x_MN if total_MM is None else _matmul(total_MM, x_MN)


def _gram_is_cheaper(m: int, n: int, num_steps: int) -> bool:
  """Compares the multiplications of the two forms, in units of m^2."""
  plain = num_steps * (2 * n + m)
  gram = 2 * n + (4 * num_steps - 3) * m
  return gram < plain


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  exact = a.dtype == jnp.float32
  return jnp.matmul(a, b, precision="highest" if exact else None)
