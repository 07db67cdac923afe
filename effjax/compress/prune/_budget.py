"""How much of each matrix is pruned.

| budget    | sparsity of a matrix                                                  |
|-----------|-----------------------------------------------------------------------|
| "uniform" | the same for all                                                      |
| "global"  | what one threshold over all scores leaves; scores must be comparable  |
| "erk"     | density in proportion to (I + O) / (I O), at most 1                   |
| "owl"     | lower in layers with more outliers among their scores                 |

ERK is in ops.sparsity.amounts. OWL is Yin et al. 2024, arXiv:2310.05175, section 3.3,
with the constants of its code: an outlier is a score above `OUTLIER` times the mean of
its matrix; sparsities of layers are a linear function of their shares of outliers,
spread over 2 x `OWL_SPREAD`, with the asked one as their mean.

All budgets keep the number of weights asked for, up to the rounding of each matrix.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config, errors

BUDGETS = ("uniform", "global", "erk", "owl")
OUTLIER = 5.0
OWL_SPREAD = 0.08


def outlier_shares(scores: jax.Array, stacked: bool) -> jax.Array:
  """Shares of scores above OUTLIER times their mean: a scalar, or `[layers]`."""
  axes = tuple(range(int(stacked), scores.ndim))
  mean = jnp.mean(scores, axis=axes, keepdims=True)
  return jnp.mean(scores > OUTLIER * mean, axis=axes)


def owl_sparsities(
  shares: Mapping[str, jax.Array],
  layers: Mapping[str, str],
  sizes: Mapping[str, int],
  sparsity: float,
) -> dict[str, jax.Array]:
  """The sparsity of each matrix under OWL.

  Args:
    shares: of outliers, of each matrix a scalar, or `[layers]` of what is stacked.
    layers: of each matrix the layer it is in; those stacked are layers of their own.
    sizes: weights of each matrix, of one layer of what is stacked.
    sparsity: asked for; near 0 and 1 less is spread.

  Returns:
    Sparsities in the shapes of `shares`.
  """
  groups = {}
  for path in sorted(shares):
    for i in range(jnp.size(shares[path])):
      groups.setdefault((layers[path], i), []).append(path)
  names = list(groups)
  # Over a layer every matrix counts as much as it has weights (in the code: the same).
  share = jnp.stack(
    [
      sum(sizes[path] * jnp.ravel(shares[path])[i] for path in groups[layer, i])
      / sum(sizes[path] for path in groups[layer, i])
      for layer, i in names
    ]
  )
  weight = np.array([sum(sizes[path] for path in groups[name]) for name in names])
  weight = jnp.asarray(weight / weight.sum(), jnp.float32)
  reach = jnp.max(share) - jnp.min(share)
  # The mean may lie at either end of what is spread, and all must stay within [0, 1).
  room = min(OWL_SPREAD, sparsity / 2, (1 - sparsity) / 4)
  placed = jnp.where(reach > 0, (share - jnp.min(share)) / reach, 0.0) * 2 * room
  found = sparsity - (placed - jnp.sum(weight * placed))
  at = {name: i for i, name in enumerate(names)}
  return {
    path: jnp.stack(
      [found[at[layers[path], i]] for i in range(jnp.size(shares[path]))]
    ).reshape(jnp.shape(shares[path]))
    for path in shares
  }


def check(budget: str, sparsity: float) -> None:
  """Raises InputError for a sparsity that is no share, or an unknown budget."""
  config.require(
    0.0 <= sparsity < 1.0, f"sparsity={sparsity} must be at least 0 and below 1"
  )
  if budget not in BUDGETS:
    raise errors.unknown("budget", budget, BUDGETS)
