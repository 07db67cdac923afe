"""RigL: every so often the smallest weights move to where gradients are largest.

Source: Evci et al. 2020, arXiv:1911.11134, Algorithm 1: at step t = dt, 2 dt, ...
before T_end the share alpha / 2 (1 + cos(pi t / T_end)) of the weights of each matrix
goes, those of smallest magnitude, and as many come where the gradient, dense in this
step only, is largest, of value 0. The optimizer does not step then; learning rates go
on by the step, as if it had. What is dropped and grown again at once keeps its weight,
as in the authors' code. Rounding: round(share x weights), halves to even. T_end is
three quarters of the steps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core import config
from effjax.ops.sparsity import topology
from effjax.optim import base, sparse
from effjax.optim.sparsifiers import _moving


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(_moving.MovingOptions):
  """Options of `rigl`; dt is `every`, alpha `drop_fraction`, T_end `end_fraction`."""

  def __post_init__(self):
    super().__post_init__()
    config.require(
      self.every > 1, f"every must be at least 2, or nothing trains: {self.every}"
    )


def make(
  inner: optax.GradientTransformation,
  target: sparse.Target,
  num_steps: int,
  options: Options,
  key: jax.Array,
) -> optax.GradientTransformation:
  """The optimizer under masks that gradients move; state: one mask a parameter."""
  number = _moving.last_change(options, num_steps)
  shares = _moving.shares(options, num_steps, number)
  tables = {}
  for path in target.shapes:
    moved = [round(share * target.num_kept(path)) for share in shares.tolist()]
    tables[path] = np.array(moved, np.int32)

  def revise(now):
    index = now.count // options.every
    return {
      path: topology.rigl(
        now.weights[path], mask, now.gradients[path], jnp.asarray(tables[path])[index]
      )
      for path, mask in now.masks.items()
    }

  rule = sparse.Rule(
    start=lambda weights, key: _moving.random_masks(weights, target, key),
    revise=revise,
    due=_moving.due(options, number),
    steps=False,
  )
  return sparse.wrap(inner, target, rule, key)


def rate_of_updates(
  rate: base.Schedule, num_steps: int, options: Options
) -> base.Schedule:
  """The rate by updates of the optimizer, which has none where masks change."""
  number = _moving.last_change(options, num_steps)

  def of_update(update):
    # Steps j every + 1 to (j + 1) every - 1 hold updates j (every - 1) + 1 onwards.
    skipped = jnp.minimum(jnp.maximum(update - 1, 0) // (options.every - 1), number)
    return rate(update + skipped)

  return of_update


TECHNIQUE = base.SparsityTechnique(
  make, Options, fit=_moving.last_change, rate=rate_of_updates
)
