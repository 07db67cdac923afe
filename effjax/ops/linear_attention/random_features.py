"""Random directions whose features estimate the softmax kernel (FAVOR+).

Source: Choromanski et al. 2020, arXiv:2009.14794, section 2.4: rows that are each
Gaussian, and orthogonal to each other in blocks of K.
Deviations from the authors' code: the columns of Q get the signs of R's diagonal,
without which Q is not uniform (the first entry of each first row would always be
negative), and the estimate not unbiased; norms and directions have keys of their own.

Local letters: M random features, Z blocks of K of them.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def draw(key: jax.Array, num_features: int, head_dim: int) -> jax.Array:
  """Fresh features w_MK in float32, on the device."""
  direction_key, norm_key = jax.random.split(key)
  shape = (-(-num_features // head_dim), head_dim, head_dim)
  square_ZKK = jax.random.normal(direction_key, shape)
  rows_MK = jax.random.normal(norm_key, (num_features, head_dim))
  return _orthogonal(square_ZKK, rows_MK, jnp)


@functools.cache
def fixed(seed: int, num_features: int, head_dim: int) -> np.ndarray:
  """The features w_MK of a seed: a constant of the program, float32.

  NumPy draws them, so that a compiled step holds the numbers and no decomposition.
  """
  rng = np.random.default_rng(seed)
  square_ZKK = rng.standard_normal((-(-num_features // head_dim), head_dim, head_dim))
  rows_MK = rng.standard_normal((num_features, head_dim))
  w_MK = _orthogonal(square_ZKK, rows_MK, np).astype(np.float32)
  w_MK.flags.writeable = False  # cached: everyone gets this array
  return w_MK


def _orthogonal(square_ZKK: Any, rows_MK: Any, xp: ModuleType) -> Any:
  """Orthogonal directions from Gaussian matrices, with the norms of Gaussian rows.

  Those norms are chi-distributed with K degrees of freedom, so that each row alone is
  a standard Gaussian vector.
  """
  q_ZKK, r_ZKK = xp.linalg.qr(square_ZKK)
  signs_ZK = xp.where(xp.diagonal(r_ZKK, axis1=1, axis2=2) < 0, -1.0, 1.0)
  directions_ZKK = xp.swapaxes(q_ZKK * signs_ZK[:, None, :], 1, 2)
  num_features, head_dim = rows_MK.shape
  directions_MK = directions_ZKK.reshape(-1, head_dim)[:num_features]
  return directions_MK * xp.linalg.norm(rows_MK, axis=-1, keepdims=True)
