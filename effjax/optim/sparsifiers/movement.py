"""Movement pruning: weights stay that fine-tuning moves away from zero.

Source: Sanh et al. 2020, arXiv:2005.07683, sections 3 and 4: scores S add up
-w dL/dw over the updates, and the top v of each matrix by S stay (the hard form). v
follows the cubic schedule; the masks go on changing after it, at the last v. As there,
gradients pass straight through the mask: w is the last value of a weight that is not
there, which scores on and can come back with that value. Deviations: the optimizer's
moments of a weight start anew when it comes back; S has no learning rate of its own,
which would change no order. A change of the masks reads the scores 32 times, so `every`
of 10 is much cheaper than the paper's 1.
"""

import dataclasses

import jax
import optax

from effjax.optim import base, sparse
from effjax.optim.sparsifiers import _cubic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(_cubic.CubicOptions):
  """Options of `movement`: those of the schedule; the paper's masks change always.

  Attributes:
    every: see CubicOptions.
  """

  every: int = 1


def make(
  inner: optax.GradientTransformation,
  target: sparse.Target,
  num_steps: int,
  options: Options,
  key: jax.Array,
) -> optax.GradientTransformation:
  """The optimizer under masks of rising sparsity.

  State: of each parameter a mask, scores and the values of what is not there.
  """
  number = _cubic.num_updates(options, num_steps)
  tables = _cubic.counts(target, options, number)
  rule = sparse.Rule(
    start=lambda weights, key: _cubic.start(weights, tables, options),
    revise=lambda now: _cubic.keep(now.scores, tables, options, now.count),
    due=_cubic.due(options, None),
    score=lambda weight, gradient: -weight * gradient,
    holds=True,
  )
  return sparse.wrap(inner, target, rule, key)


TECHNIQUE = base.SparsityTechnique(make, Options, fit=_cubic.num_updates)
