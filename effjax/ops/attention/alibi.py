"""Attention with linear biases: the slopes of the heads.

Press, Smith and Lewis 2021, arXiv:2108.12409, section 3. The bias of head h on a score
is -m_h times the distance; a query that may look ahead uses the absolute distance.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def slopes(num_heads: int) -> jax.Array:
  """The slopes m, float32 [num_heads], positive.

  For n heads, n a power of two, 2 ** (-8 / n) and its powers up to 2 ** -8. For other
  counts, as in the authors' code: those of the power of two below, followed by every
  second one of the power of two above.
  """
  below = 2 ** math.floor(math.log2(num_heads))
  powers = lambda n: 2.0 ** (-8 / n * np.arange(1, n + 1))
  found = [powers(below), powers(2 * below)[::2]]
  return jnp.asarray(np.concatenate(found)[:num_heads], jnp.float32)
