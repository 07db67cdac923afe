"""Complex numbers as pairs of real arrays: the real and the imaginary parts."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[jax.Array, jax.Array]


def exp(z: jax.Array) -> Pair:
  """The exponential of complex numbers, given with their parts stacked on axis 0."""
  size = jnp.exp(z[0])
  return size * jnp.cos(z[1]), size * jnp.sin(z[1])


def multiply(
  a: Sequence[jax.Array] | jax.Array, b: Sequence[jax.Array] | jax.Array
) -> Pair:
  """The product; arguments may also be arrays with their parts stacked on axis 0."""
  return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def each(fn: Callable[[jax.Array], jax.Array], pair: Pair) -> Pair:
  """The function of both parts."""
  return fn(pair[0]), fn(pair[1])


def geometric(first: Pair, ratio: Pair, count: int) -> Pair:
  """First, first * ratio, ... of `[I, N]`: a pair of `[I, count, N]`.

  A loop, because in one expression XLA's CPU compiler would take the exponentials and
  sines in both arguments again for every power.
  """
  body = lambda z, _: (multiply(z, ratio), z)
  _, powers = lax.scan(body, first, None, length=count)
  return each(lambda z: jnp.moveaxis(z, 0, 1), powers)
