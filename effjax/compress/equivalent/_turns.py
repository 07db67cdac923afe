"""A rotation of a few channels, applied to whichever axis of a weight carries them."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.ops.matmul import hadamard

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
  """A rotation Q of n channels: `diag(signs) H / sqrt(n)`, or any orthogonal matrix.

  The signs come before H: after it they would spread nothing.

  Attributes:
    signs: `[n]`, or None.
    matrix: Q `[n, n]`, where there is no Hadamard matrix; else None.
  """

  signs: Any
  matrix: Any = None

  @property
  def size(self) -> int:
    """The number of channels."""
    return len(self.signs if self.matrix is None else self.matrix)


def make(seed: int, size: int, what: str) -> Turn:
  """A random rotation of `size` channels: randomized Hadamard if there is one.

  Else it is uniform over all orthogonal matrices: Q of a Gaussian matrix's QR with the
  signs of R's diagonal (Mezzadri 2007, arXiv:math-ph/0609050), and the log says so.

  Args:
    seed: of the random numbers.
    size: channels.
    what: they are, for the log.
  """
  if hadamard.exists(size):
    return Turn(hadamard.random_signs(jax.random.key(seed), size))
  log.warning(
    "rotation: no Hadamard matrix of order %d is known for %s; a random rotation "
    "stands in for it",
    size,
    what,
  )
  gaussian = np.random.default_rng(seed).standard_normal((size, size))
  q, r = np.linalg.qr(gaussian)
  return Turn(None, jnp.asarray(q * np.sign(np.diagonal(r))))


@jax.jit
def forward(turn: Turn, x: jax.Array) -> jax.Array:
  """`x Q` for each n channels of the last axis, computed in float32 at least."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  parts = x.astype(wide).reshape(-1, turn.size)
  with jax.default_matmul_precision("highest"):
    if turn.matrix is None:
      turned = hadamard.transform(parts * turn.signs[None].astype(wide))
    else:
      turned = parts @ turn.matrix.astype(wide)
  return turned.reshape(x.shape).astype(x.dtype)


def outputs(turn: Turn, w: jax.Array) -> jax.Array:
  """`W Q` of what writes the channels: a matrix, an embedding, a bias."""
  return forward(turn, w)


def inputs(turn: Turn, w: jax.Array) -> jax.Array:
  """`Q^T W` of a matrix `[..., in, out]` that reads the channels."""
  return jnp.swapaxes(forward(turn, jnp.swapaxes(w, -1, -2)), -1, -2)
