"""First-order Taylor pruning: weights go whose removal changes the loss least.

Score |g w|, with g the gradient of the mean loss of all batches: the first term of what
setting w to zero does to the loss (Molchanov et al. 2019, arXiv:1906.10771, eq. 8,
before squaring). On a model that was not trained yet it is SNIP (Lee et al. 2019,
arXiv:1810.02340, eq. 6). At a minimum g is zero but for noise, and "fisher" says more.
"""

import jax.numpy as jnp

from effjax.compress import derivatives
from effjax.compress.prune import _derived

TECHNIQUE = _derived.transform(
  "taylor",
  lambda model, params, batches, paths, options: derivatives.gradients(
    model, params, batches, paths
  ),
  lambda gradient, w: jnp.abs(gradient * w),
  _derived.DerivedOptions,
)
