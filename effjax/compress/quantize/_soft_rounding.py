"""Rounding as a variable between 0, down, and 1, up: the formulas of AdaRound.

Source: Nagel et al. 2020, arXiv:2004.10568, eq. 22 to 24: the rectified sigmoid of
Louizos et al. 2018, arXiv:1712.01312, and a regularizer that drives it to 0 or 1.
"""

import jax
import jax.numpy as jnp

# How far the sigmoid is stretched, so that 0 and 1 are reached by finite variables.
ZETA, GAMMA = 1.1, -0.1


def share(v: jax.Array) -> jax.Array:
  """Eq. 23: h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)."""
  return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)


def variable(h: jax.Array) -> jax.Array:
  """The V with h(V) = h, for h between 0 and 1; finite."""
  inner = (h - GAMMA) / (ZETA - GAMMA)
  return jnp.log(inner) - jnp.log1p(-inner)


def undecided(h: jax.Array, beta: jax.Array) -> jax.Array:
  """Eq. 24 of each variable: 1 - |2h - 1|^beta, 0 where it is decided."""
  return 1 - jnp.abs(2 * h - 1) ** beta


def annealed(
  step: jax.Array, num_steps: int, warmup: float, ends: tuple[float, float]
) -> jax.Array:
  """Beta at a step: the first end until the warm-up is over, then on to the other.

  Linear, as in the authors' code of BRECQ; the paper says "annealed".

  Args:
    step: from 0.
    num_steps: of the whole.
    warmup: share of the steps.
    ends: the first and the last beta.
  """
  first = warmup * num_steps
  done = jnp.clip((step - first) / max(num_steps - first, 1), 0, 1)
  return ends[0] + (ends[1] - ends[0]) * done
