"""Calibration: what flows into each weight of a model, gathered over real batches.

One-shot: the model runs as it is, and every weight's observe hook (weights.weight) adds
to running sums in the `stats` collection, so memory does not grow with the data.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.core import tree as tree_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputStats:
  """Statistics of the inputs of one weight, per input channel I, in float32.

  Leading axes are the weight's stacked ones. Padding (segment 0) does not count. A
  weight used in several places sums over its uses.

  Attributes:
    square_sum: sum over tokens of x_i^2, `[*stack, I]`.
    absmax: largest |x_i|, `[*stack, I]`.
    count: tokens summed over, `[*stack]`.
  """

  square_sum: Any
  absmax: Any
  count: Any

  @property
  def mean_square(self) -> jax.Array:
    """Mean of x_i^2, `[*stack, I]`; zero where nothing was seen."""
    return self.square_sum / jnp.maximum(self.count, 1.0)[..., None]


def calibrate(
  model: Any,
  params: Mapping[str, Any],
  batches: Iterable[Mapping[str, Any]],
  *,
  limit_bytes: int = 2**30,
) -> dict[str, Any]:
  """Runs batches through a model and returns the statistics of every weight's inputs.

  Args:
    model: a decoder.
    params: its parameters; any leaf kinds.
    batches: dicts with "inputs" `[B, L]` and, where sequences are packed or padded,
      "segments" and "positions"; all of one shape, so that one program serves them.
    limit_bytes: most memory the statistics may take.

  Returns:
    A tree of `InputStats` at the paths of the weights that contract an input; weights
    that do not (norms, for example) are absent.

  Raises:
    InputError: there are no batches, or the statistics would pass `limit_bytes`.
  """
  step = jax.jit(
    lambda params, stats, batch: _observe(model, params, stats, batch),
    donate_argnums=1,
  )
  stats = None
  for batch in batches:
    batch = {
      name: jnp.asarray(batch[name])
      for name in ("inputs", "segments", "positions")
      if name in batch
    }
    if stats is None:
      stats = _zeros(model, params, batch, limit_bytes)
    stats = step(params, stats, batch)
  config.require(stats is not None, "calibration needs at least one batch")
  return _as_leaves(stats)


def _observe(model: Any, params: Any, stats: Any, batch: Mapping[str, Any]) -> Any:
  variables = (
    {"params": params} if stats is None else {"params": params, "stats": stats}
  )
  _, changed = model.apply(
    variables,
    batch["inputs"],
    positions=batch.get("positions"),
    segments=batch.get("segments"),
    mutable=["stats"],
  )
  return changed["stats"]


def _zeros(model: Any, params: Any, batch: Any, limit_bytes: int) -> Any:
  """Statistics of no data: all sums start from zero, and so does every maximum."""
  shapes = jax.eval_shape(lambda p, b: _observe(model, p, None, b), params, batch)
  needed_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))
  config.require(
    needed_bytes <= limit_bytes,
    f"calibration statistics take {needed_bytes} bytes, the limit is {limit_bytes}; "
    "raise limit_bytes or calibrate fewer weights",
  )
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def _as_leaves(stats: Mapping[str, Any]) -> dict[str, Any]:
  """Gathers the three arrays of each weight into one InputStats."""
  fields: dict[str, dict[str, Any]] = {}
  for path, array in tree_lib.flatten(stats).items():
    weight, _, field = path.rpartition("/")
    fields.setdefault(weight, {})[field] = array
  return tree_lib.unflatten({path: InputStats(**f) for path, f in fields.items()})
