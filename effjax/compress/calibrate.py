"""Calibration: what flows into each weight of a model, gathered over real batches.

One-shot: the model runs as it is, and every weight's observe hook (weights.weight) adds
to running sums in the `stats` collection, so memory does not grow with the data.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config, errors, select
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.weights import weight as weight_lib

LIMIT_BYTES = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputStats:
  """Statistics of the inputs of one weight, per input channel I, in float32.

  Leading axes are the weight's stacked ones, and its experts: each has those of the
  tokens it was given. Padding (segment 0) does not count. A weight used in several
  places sums over its uses.

  Attributes:
    square_sum: sum over tokens of x_i^2, `[*stack, I]`.
    absmax: largest |x_i|, `[*stack, I]`.
    count: tokens summed over, `[*stack]`.
    hessian: sum over tokens of `x x^T`, `[*stack, I, I]`, or None if not collected. Of
      the squared error of a layer's outputs the Hessian is twice it.
    abs_sum: sum over tokens of |x_i|, `[*stack, I]`, or None if not collected.
    histogram: how many |x_i|, of all channels, lie in each of the bins K of
      ops.matmul.histogram, `[*stack, K]`, or None if not collected.
  """

  square_sum: Any
  absmax: Any
  count: Any
  hessian: Any = None
  abs_sum: Any = None
  histogram: Any = None

  @property
  def mean_square(self) -> jax.Array:
    """Mean of x_i^2, `[*stack, I]`; zero where nothing was seen."""
    return self.square_sum / jnp.maximum(self.count, 1.0)[..., None]


def calibrate(
  model: Any,
  params: Mapping[str, Any],
  batches: Iterable[Mapping[str, Any]],
  *,
  collect: Sequence[str] = ("moments",),
  where: select.Where | Mapping[str, Any] | None = None,
  limit_bytes: int = LIMIT_BYTES,
) -> dict[str, Any]:
  """Runs batches through a model and returns the statistics of every weight's inputs.

  Args:
    model: a decoder.
    params: its parameters; any leaf kinds.
    batches: dicts with "inputs" `[B, L]` and, where sequences are packed or padded,
      "segments" and "positions"; all of one shape, so that one program serves them.
    collect: "moments" (sums a channel, always there), "magnitudes" (`abs_sum`),
      "histogram" and "hessian", which takes I^2 numbers for a weight of I inputs.
    where: which weights (see core.select), such as {"path": "mlp"}; None for all.
    limit_bytes: most memory the statistics may take.

  Returns:
    A tree of `InputStats` at the paths of the weights that contract an input; weights
    that do not (norms, for example) are absent.

  Raises:
    InputError: there are no batches, nothing selected contracts an input, the
      statistics would pass `limit_bytes`, or they are not finite.
  """
  observe = _observer(model, collect, where)
  step = jax.jit(observe, donate_argnums=1)
  stats = None
  for batch in batches:
    batch = {
      name: jnp.asarray(batch[name])
      for name in ("inputs", "segments", "positions")
      if name in batch
    }
    if stats is None:
      shapes = _shapes(observe, params, batch, limit_bytes)
      # All sums start from zero, and so does every maximum.
      stats = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    stats = step(params, stats, batch)
  config.require(stats is not None, "calibration needs at least one batch")
  return finished(stats)


def abstract(
  model: Any,
  params: Mapping[str, Any],
  *,
  collect: Sequence[str] = ("moments",),
  where: select.Where | Mapping[str, Any] | None = None,
  limit_bytes: int = LIMIT_BYTES,
) -> dict[str, Any]:
  """What `calibrate` would return, of ShapeDtypeStructs; nothing is computed.

  Args:
    model, collect, where, limit_bytes: see `calibrate`.
    params: arrays or ShapeDtypeStructs.

  Raises:
    InputError: nothing selected contracts an input, or the limit would be passed.
  """
  batch = {"inputs": model.example_inputs()[0]}
  observe = _observer(model, collect, where)
  return _as_leaves(_shapes(observe, params, batch, limit_bytes))


def _observer(
  model: Any,
  collect: Sequence[str],
  where: select.Where | Mapping[str, Any] | None,
) -> Callable[[Any, Any, Any], Any]:
  """`observe(params, stats, batch)`: the statistics with a batch added to them."""
  for name in collect:
    if name not in weight_lib.COLLECTED:
      raise errors.unknown("statistic to collect", name, weight_lib.COLLECTED)
  paths = None
  if where is not None:
    paths = select.select(specs_lib.specs(model), select.parse(where, select.Where()))
  return lambda *args: _observe(model, collect, paths, *args)


def _observe(
  model: Any,
  collect: Sequence[str],
  paths: Collection[str] | None,
  params: Any,
  stats: Any,
  batch: Mapping[str, Any],
) -> Any:
  variables = (
    {"params": params} if stats is None else {"params": params, "stats": stats}
  )
  with weight_lib.collecting(collect, paths):
    _, changed = model.apply(
      variables,
      batch["inputs"],
      positions=batch.get("positions"),
      segments=batch.get("segments"),
      mutable=["stats"],
    )
  return changed.get("stats", {})


def _shapes(
  observe: Callable[[Any, Any, Any], Any], params: Any, batch: Any, limit_bytes: int
) -> Any:
  """Shapes of the statistics, if there are any and they fit."""
  shapes = jax.eval_shape(lambda p, b: observe(p, None, b), params, batch)
  config.require(
    len(shapes) > 0, "nothing to calibrate: no selected weight contracts an input"
  )
  require_fits(shapes, limit_bytes)
  return shapes


def require_fits(shapes: Any, limit_bytes: int) -> None:
  """Raises InputError if statistics of these shapes take more than `limit_bytes`."""
  needed_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))
  config.require(
    needed_bytes <= limit_bytes,
    f"calibration statistics take {needed_bytes} bytes, the limit is {limit_bytes}; "
    "raise limit_bytes, or calibrate fewer weights at a time with where",
  )


def _as_leaves(stats: Mapping[str, Any]) -> dict[str, Any]:
  """Gathers the arrays of each weight into one InputStats."""
  fields: dict[str, dict[str, Any]] = {}
  for path, array in tree_lib.flatten(stats).items():
    weight, _, field = path.rpartition("/")
    fields.setdefault(weight, {})[field] = array
  return tree_lib.unflatten({path: InputStats(**f) for path, f in fields.items()})


def finished(stats: Mapping[str, Any]) -> dict[str, Any]:
  """The tree of InputStats of a collection `stats` as the model wrote it.

  Raises:
    InputError: they are not finite; the first weight is named.
  """
  leaves = _as_leaves(stats)
  _require_finite(leaves)
  return leaves


def _require_finite(leaves: Mapping[str, Any]) -> None:
  """Refuses statistics with a NaN or an infinity, naming the first weight."""
  flat = tree_lib.flatten(leaves)
  finite = jax.device_get(_finite(flat))
  bad = [path for path, ok in finite.items() if not ok]
  config.require(
    not bad,
    f"what flows into {bad[0] if bad else None} is not finite (of {len(bad)} of "
    f"{len(flat)} weights); the model or its precision overflows on these batches",
  )


@jax.jit
def _finite(flat: dict[str, InputStats]) -> dict[str, jax.Array]:
  # Every array is a sum of squares or a maximum over the same rows: a diagonal of the
  # Hessian that is finite has rows and columns that are.
  return {path: jnp.all(jnp.isfinite(s.square_sum)) for path, s in flat.items()}
