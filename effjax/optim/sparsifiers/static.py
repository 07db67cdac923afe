"""Static sparse training: a random mask from the start, which never changes.

What every other kind has to beat; as in Evci et al. 2020, arXiv:1911.11134, section 4.
Matrices keep their initial values, which are those of a dense matrix, as there.
"""

import dataclasses

import jax
import optax

from effjax.optim import base, sparse
from effjax.optim.sparsifiers import _moving


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """`static` has no options: sparsity, budget and where say it all."""


def make(
  inner: optax.GradientTransformation,
  target: sparse.Target,
  num_steps: int,
  options: Options,
  key: jax.Array,
) -> optax.GradientTransformation:
  """The optimizer under fixed random masks; state: one mask a parameter."""
  start = lambda weights, key: _moving.random_masks(weights, target, key)
  return sparse.wrap(inner, target, sparse.Rule(start=start), key)


TECHNIQUE = base.SparsityTechnique(make, Options)
