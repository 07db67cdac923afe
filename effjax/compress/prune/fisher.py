"""Fisher pruning: second-order, with the Fisher information for the Hessian.

Source: Theis et al. 2018, arXiv:1801.05787, eq. 6: score 1/2 F w^2, F the diagonal of
the empirical Fisher information, here of the rows of all batches
(compress.derivatives.fisher). It is the rise of the loss from removing w where the
gradient is zero and the model says what the data does.
"""

import jax.numpy as jnp

from effjax.compress import derivatives
from effjax.compress.prune import _derived

TECHNIQUE = _derived.transform(
  "fisher",
  lambda model, params, batches, paths, options: derivatives.fisher(
    model, params, batches, paths
  ),
  lambda fisher, w: 0.5 * fisher * jnp.square(w),
  _derived.DerivedOptions,
)
