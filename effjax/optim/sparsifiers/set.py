"""SET: every so often the smallest weights move to random places.

Source: Mocanu et al. 2018, arXiv:1707.04780: of a random mask the share zeta of the
smallest positive and of the largest negative weights of each matrix goes, and as many
random ones come, of value 0 (as in the authors' Keras code). Deviations: masks change
every so many updates in place of once an epoch, and no more after `end_fraction` of
them; a place that is drawn again at once keeps its weight. The exact rule, with zeros
among the positive: ops.sparsity.topology.set_update.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.ops.sparsity import topology
from effjax.optim import base, sparse
from effjax.optim.sparsifiers import _moving


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(_moving.MovingOptions):
  """Options of `set`; zeta is `drop_fraction`, and the paper's is constant.

  Attributes:
    decay: see MovingOptions.
  """

  decay: str = "constant"


def make(
  inner: optax.GradientTransformation,
  target: sparse.Target,
  num_steps: int,
  options: Options,
  key: jax.Array,
) -> optax.GradientTransformation:
  """The optimizer under masks that move at random; state: one mask a parameter."""
  number = _moving.last_change(options, num_steps)
  table = _moving.shares(options, num_steps, number).astype(np.float32)

  def revise(now):
    share = jnp.asarray(table)[now.count // options.every]
    return {
      path: topology.set_update(
        sparse.path_key(now.key, path), now.weights[path], mask, share
      )
      for path, mask in now.masks.items()
    }

  rule = sparse.Rule(
    start=lambda weights, key: _moving.random_masks(weights, target, key),
    revise=revise,
    due=_moving.due(options, number),
  )
  return sparse.wrap(inner, target, rule, key)


TECHNIQUE = base.SparsityTechnique(make, Options, fit=_moving.last_change)
