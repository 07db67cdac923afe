"""Optimal Brain Damage: second-order, with the diagonal of the Hessian.

Source: LeCun, Denker and Solla 1989, eq. 5: saliency 1/2 h_ii w_i^2, with h the second
derivatives of the mean loss in the Levenberg-Marquardt approximation (their section
2.2), which leaves the Gauss-Newton part: none is negative. Deviation: in place of a
recursion with a rule for each kind of layer, h is estimated from gradients of targets
that the model itself draws (Liu et al. 2023, arXiv:2305.14342, section 2.3), which
serves every architecture; cross terms, which the recursion drops, are kept.
"""

import dataclasses

import jax.numpy as jnp

from effjax.compress import derivatives
from effjax.compress.prune import _derived
from effjax.core import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class OBDOptions(_derived.DerivedOptions):
  """Options of OBD.

  Attributes:
    probes: how often targets are drawn for each batch; the error of an estimate falls
      with the root of it.
    seed: of what is drawn.
  """

  probes: int = 4
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    config.require(self.probes > 0, f"probes={self.probes} must be positive")


TECHNIQUE = _derived.transform(
  "obd",
  lambda model, params, batches, paths, options: derivatives.fisher(
    model, params, batches, paths, probes=options.probes, seed=options.seed
  ),
  lambda diagonal, w: 0.5 * diagonal * jnp.square(w),
  OBDOptions,
)
