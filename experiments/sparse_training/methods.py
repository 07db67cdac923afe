"""Ways to a sparse network, as functions of blocks of training.

Each gives the first masks and what becomes of them between blocks. The topology updates
are those that `effjax.optim.sparsifiers` uses, under `vmap` over the seeds.
"""

import functools
import math

import jax
import jax.numpy as jnp

from effjax.ops.sparsity import amounts, topology
from experiments.sparse_training import network as network_lib

# Alpha of RigL and zeta of SET, and the part of a training in which masks change.
MOVED, END = 0.3, 0.75
METHODS = ("static", "set", "rigl", "gradual")
# Purposes of random keys; 0 to 2 are taken by the network.
_MASKS, _GROWTH = 3, 4


def numbers_kept(
  network: network_lib.Network, sparsity: float, budget: str
) -> dict[str, int]:
  """How many weights each hidden matrix has in the end."""
  shares = amounts.shares(network.shapes, sparsity, budget)
  return {
    path: amounts.number_kept(math.prod(network.shapes[path]), share)
    for path, share in shares.items()
  }


def random_masks(
  network: network_lib.Network, kept: dict[str, int], purpose: int = _MASKS
) -> dict[str, jax.Array]:
  """Random masks with these counts, of every seed."""
  masks = {}
  for i, (path, shape) in enumerate(network.shapes.items()):
    draw = lambda key, shape=shape, path=path: topology.random(key, shape, kept[path])
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(network.keys(purpose), i)
    masks[path] = jax.vmap(draw)(keys)
  return masks


def train(
  network: network_lib.Network, method: str, sparsity: float, budget: str
) -> tuple[dict, dict[str, jax.Array]]:
  """Parameters and masks after a training; "dense" takes no notice of the rest."""
  params, opt_state = network.init()
  if method == "dense":
    params, _, masks = network.train(params, opt_state, {})
    return params, masks
  kept = numbers_kept(network, sparsity, budget)
  masks = {} if method == "gradual" else random_masks(network, kept)
  revise = None
  if method != "static":
    by_name = {"set": _set, "rigl": _rigl, "gradual": _gradual}
    revise = functools.partial(by_name[method], network, sparsity, budget)
  params, _, masks = network.train(params, opt_state, masks, revise=revise)
  return params, masks


def end_of_changes(plan: network_lib.Plan) -> int:
  """The step before or at which masks change for the last time."""
  return int(END * plan.num_steps)


def _set(network, sparsity, budget, step, weights, masks, gradient):
  del sparsity, budget, gradient
  if step >= end_of_changes(network.plan):
    return None
  share = amounts.cosine(MOVED, step, float(end_of_changes(network.plan)))
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(network.keys(_GROWTH), step)
  return _set_update(keys, weights, masks, share)


@jax.jit
def _set_update(keys, weights, masks, share):
  update = jax.vmap(topology.set_update, in_axes=(0, 0, 0, None))
  split = lambda i: jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)
  return {
    path: update(split(i), weights[path], mask, share)
    for i, (path, mask) in enumerate(masks.items())
  }


def _rigl(network, sparsity, budget, step, weights, masks, gradient):
  if step >= end_of_changes(network.plan):
    return None
  share = amounts.cosine(MOVED, step, float(end_of_changes(network.plan)))
  kept = numbers_kept(network, sparsity, budget)
  moved = {path: round(share * number) for path, number in kept.items()}
  return _rigl_update(weights, masks, gradient(), moved)


@jax.jit
def _rigl_update(weights, masks, gradients, moved):
  update = jax.vmap(topology.rigl, in_axes=(0, 0, 0, None))
  return {
    path: update(weights[path], mask, gradients[path], moved[path])
    for path, mask in masks.items()
  }


def _gradual(network, sparsity, budget, step, weights, masks, gradient):
  del masks, gradient
  number = end_of_changes(network.plan) // network.plan.every
  index = step // network.plan.every
  if index > number:
    return None
  kept = {}
  for path, share in amounts.shares(network.shapes, sparsity, budget).items():
    now = float(amounts.cubic(0.0, share, number)[index])
    kept[path] = amounts.number_kept(math.prod(network.shapes[path]), now)
  return keep_largest(weights, kept)


@jax.jit
def keep_largest(
  weights: dict[str, jax.Array], kept: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Masks of so many of the largest weights of each matrix."""
  return {path: topology.keep(jnp.abs(w), kept[path]) for path, w in weights.items()}
