"""FLOPs of a model per token, and what they would be if pruned weights were skipped.

How they are counted: effjax.ops.flops.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from effjax.core import tree as tree_lib
from effjax.measure import leaves
from effjax.ops import flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
  """FLOPs per token of a forward pass.

  Attributes:
    executed: what runs, for the parameters as they are held: a masked weight is
      multiplied whole, an int8 product counts like a float one.
    theoretical: without the multiplications by pruned weights.
  """

  executed: float
  theoretical: float


def per_token(model: Any, params: Mapping[str, Any], length: int) -> Flops:
  """FLOPs per token of a forward pass over one sequence of `length` tokens.

  Attention counts as it is computed: where the whole square of queries and keys is
  multiplied and the future masked, the whole square counts, in both numbers.

  Args:
    model: a Decoder.
    params: its parameters, of any leaf kinds; only traced.
    length: tokens of the sequence.
  """
  flat = tree_lib.flatten(params)
  tokens_BL = jax.ShapeDtypeStruct((1, length), np.int32)

  def forward(flat_params: dict[str, Any], tokens_BL: jax.Array) -> jax.Array:
    return model.apply({"params": tree_lib.unflatten(flat_params)}, tokens_BL)[0]

  costs = flops.per_parameter(forward, flat, tokens_BL)
  executed = sum(costs.values())
  kept = leaves.kept_fractions(flat)
  saved = sum(cost * (1 - kept.get(path, 1)) for path, cost in costs.items())
  return Flops(executed=executed / length, theoretical=(executed - saved) / length)
