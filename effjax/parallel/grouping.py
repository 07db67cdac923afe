"""Parameters of a run of layers, as groups of layers on the stages of a pipeline.

Stage s works on groups s, s + S, ..., but arrays are spread in consecutive blocks of
layers, so with more than one group a stage they have to be sent: each stage sends its
groups, and gets as many. Where gradients are taken, those go back the same way.

Letters: S stages, V groups a stage has (repeats), k layers (scan steps) of a group, R
of the whole run.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from effjax.core import shard as shard_lib

# Of the mesh; see rules.AXES.
AXIS = "stage"


def by_stage(stacked: jax.Array, num_stages: int, repeats: int) -> jax.Array:
  """`[R, ...]` as `[V, S, k, ...]`, stage s holding what is at s.

  Args:
    stacked: parameters of consecutive layers; where rules are active, blocks of them
      lie on the stages. How its other axes are spread does not change.
    num_stages: S.
    repeats: V; where it is 1, nothing moves.
  """
  length = len(stacked) // (num_stages * repeats)
  shape = (repeats, num_stages, length, *stacked.shape[1:])
  active = shard_lib.current()
  if active is None:
    return stacked.reshape(shape)
  mesh, _ = active
  if repeats == 1:
    free = (PartitionSpec.UNCONSTRAINED,) * (stacked.ndim - 1)
    spec = PartitionSpec(None, AXIS, None, *free)
    return lax.with_sharding_constraint(
      stacked.reshape(shape), NamedSharding(mesh, spec)
    )

  def sent(own: jax.Array) -> jax.Array:
    here = lax.axis_index(AXIS)
    own = own.reshape(repeats, length, *own.shape[1:])
    groups = jnp.zeros_like(own)
    for pairs, sources, targets in _rounds(num_stages, repeats):
      group = lax.dynamic_index_in_dim(own, jnp.asarray(sources)[here], keepdims=False)
      group = lax.ppermute(group, AXIS, pairs)
      at = jnp.asarray(targets)[here]
      groups = lax.dynamic_update_index_in_dim(groups, group, at, 0)
    return groups[:, None]

  # The partitioner would gather all parameters on every device to do the same.
  return jax.shard_map(
    sent,
    mesh=mesh,
    in_specs=PartitionSpec(AXIS),
    out_specs=PartitionSpec(None, AXIS),
    axis_names={AXIS},
    check_vma=False,
  )(stacked)


def _rounds(
  num_stages: int, repeats: int
) -> list[tuple[list[tuple[int, int]], list[int], list[int]]]:
  """How V groups of each stage, lying in consecutive blocks, come to their stages.

  Returns:
    V rounds, in each of which every stage sends one group and gets one: the pairs of
    sender and receiver, which of its groups each sends, and which each gets.
  """
  # Stages `period` apart send to the same stages, in another order.
  period = num_stages // math.gcd(num_stages, repeats)
  rounds = []
  for turn in range(repeats):
    sources = [(turn - stage // period) % repeats for stage in range(num_stages)]
    groups = [stage * repeats + own for stage, own in enumerate(sources)]
    pairs = [(stage, group % num_stages) for stage, group in enumerate(groups)]
    targets = [0] * num_stages
    for (_, receiver), group in zip(pairs, groups, strict=True):
      targets[receiver] = group // num_stages
    rounds.append((pairs, sources, targets))
  return rounds
