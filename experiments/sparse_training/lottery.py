"""Lottery tickets: pruned by magnitude in rounds and rewound, beside two controls.

Source: Frankle and Carbin 2019, arXiv:1803.03635, with rewinding to an early step as in
Frankle et al. 2020, arXiv:1912.05671. After round r each hidden matrix has the nearest
number to 0.6^r of its weights: of those there are, the largest stay.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from effjax.ops.sparsity import amounts
from experiments.sparse_training import methods
from experiments.sparse_training import network as network_lib

ROUNDS, LEFT, REWIND = 6, 0.6, 300
# Purposes of random keys.
_OTHER_INIT, _OTHER_MASKS = 5, 6


def numbers_kept(network: network_lib.Network, round_: int) -> dict[str, int]:
  """Weights of each matrix after a round: the nearest number to 0.6^r of all."""
  return {
    path: amounts.number_kept(math.prod(shape), 1 - LEFT**round_)
    for path, shape in network.shapes.items()
  }


def next_masks(
  network: network_lib.Network,
  params: dict[str, jax.Array],
  round_: int,
) -> dict[str, jax.Array]:
  """Masks of a round, by the trained weights of the one before (0 where gone)."""
  weights = {path: params[path] for path in network.shapes}
  return methods.keep_largest(weights, numbers_kept(network, round_))


def rewound(network: network_lib.Network, rewind: int) -> tuple:
  """Parameters after `rewind` dense steps; optimizer states there, without momentum."""
  params, opt_state, _ = network.train(*network.init(), {}, stop=rewind)
  is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  still = jax.tree.map(lambda x: jnp.zeros_like(x) if is_float(x) else x, opt_state)
  return params, still


def train(
  network: network_lib.Network,
  variant: str,
  masks: dict[str, jax.Array],
  rewind: int = REWIND,
) -> dict[str, jax.Array]:
  """Trained parameters of one way to use the masks of a round.

  Args:
    network: see Network.
    variant: "ticket" (rewound weights under these masks), "reinitialized" (other
      initial weights under these masks, all steps) or "random" (rewound weights under
      random masks with as many weights).
    masks: of the round.
    rewind: the step weights are rewound to.
  """
  if variant == "reinitialized":
    return network.train(*network.init(_OTHER_INIT), masks)[0]
  if variant == "random":
    kept = {path: int(np.sum(mask[0])) for path, mask in masks.items()}
    masks = methods.random_masks(network, kept, _OTHER_MASKS)
  return network.train(*rewound(network, rewind), masks, start=rewind)[0]
