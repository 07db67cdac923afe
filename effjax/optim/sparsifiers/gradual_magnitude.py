"""Gradual magnitude pruning: more and more of the smallest weights go while it trains.

Source: Zhu and Gupta 2017, arXiv:1710.01878, eq. 1: after update t of t0, t0 + dt, ...,
t0 + n dt the share s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 of the smallest
weights of each matrix is masked, those masked before among them (they are 0). No
deviations but the counts: round(s_t I O), halves to even.
"""

import jax
import jax.numpy as jnp
import optax

from effjax.optim import base, sparse
from effjax.optim.sparsifiers import _cubic


class Options(_cubic.CubicOptions):
  """Options of `gradual_magnitude`: those of the schedule."""


def make(
  inner: optax.GradientTransformation,
  target: sparse.Target,
  num_steps: int,
  options: Options,
  key: jax.Array,
) -> optax.GradientTransformation:
  """The optimizer under masks of rising sparsity; state: one mask a parameter."""
  number = _cubic.num_updates(options, num_steps)
  tables = _cubic.counts(target, options, number)

  def revise(now):
    magnitudes = {path: jnp.abs(w) for path, w in now.weights.items()}
    return _cubic.keep(magnitudes, tables, options, now.count)

  rule = sparse.Rule(
    start=lambda weights, key: _cubic.start(weights, tables, options),
    revise=revise,
    due=_cubic.due(options, number),
  )
  return sparse.wrap(inner, target, rule, key)


TECHNIQUE = base.SparsityTechnique(make, Options, fit=_cubic.num_updates)
