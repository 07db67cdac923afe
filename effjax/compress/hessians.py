"""Hessians of layers: which can be used, and what is said of those that cannot.

For everything that fixes the inputs of a matrix in order (ops.matmul.column_sweep) with
the Hessians of calibration, collect=("hessian",).
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.compress import calibrate
from effjax.core import config, errors
from effjax.ops.matmul import column_sweep

log = logging.getLogger(__name__)

# Of stacked matrices, those whose Hessians fit into this are worked on at once: a
# device has more to do in each step, and what is inverted does not exist for all.
TOGETHER_BYTES = 2**28


class Report(NamedTuple):
  """What is known of a matrix afterwards, `[*stack]`.

  Attributes:
    used: whether calibration gave it tokens.
    finite: whether its Hessian is finite.
    damping: that was used.
    loss: tr((W - Q)^T H (W - Q)) with the damped Hessian; not finite if it failed.
  """

  used: Any
  finite: Any
  damping: Any
  loss: Any


def usable(name: str, stats: Any, w: jax.Array) -> calibrate.InputStats:
  """The statistics of w, with its Hessian `[*stack, in, in]`.

  Args:
    name: of the transform, for messages.
    stats: of its inputs, or None.
    w: `[*stack, in, out]`.

  Raises:
    InputError: there are none, without Hessians, or of another shape.
  """
  if stats is None:
    raise errors.InputError(
      f"{name} has no statistics of it; pass effjax.calibrate(model, params, batches, "
      'collect=("hessian",)). What contracts no input, such as an embedding that is '
      "only looked up, has none"
    )
  if stats.hessian is None:
    raise errors.InputError(
      f"{name} needs Hessians, which were not collected; pass effjax.calibrate(model, "
      'params, batches, collect=("hessian",))'
    )
  expected = (*w.shape[:-1], w.shape[-2])
  config.require(
    tuple(stats.hessian.shape) == expected,
    f"its Hessian has shape {tuple(stats.hessian.shape)}, not {expected}; the "
    "statistics are of another model",
  )
  return stats


def require_tokens(found: Mapping[str, calibrate.InputStats]) -> None:
  """Raises InputError unless Hessians can have full rank; of experts the fullest one.

  With fewer tokens than inputs there are directions that nothing was seen of, in which
  only the damping keeps the weights from going anywhere.
  """
  counts = {p: stats.count for p, stats in found.items() if stats.hessian is not None}
  if any(isinstance(count, jax.core.Tracer) for count in counts.values()):
    return
  for path, count in jax.device_get(counts).items():
    tokens, inputs = int(np.max(count)), found[path].hessian.shape[-1]
    config.require(
      tokens == 0 or tokens >= inputs,
      f"{path}: calibration gave it {tokens} tokens, fewer than its {inputs} inputs; "
      "calibrate on more text (num_tokens)",
    )


def check_and_tell(
  name: str, reports: Mapping[str, Report], damping: float, unseen_are: str
) -> None:
  """Says what is not as it was asked for; of shapes, as a plan has them, nothing.

  Args:
    name: of the transform.
    reports: by path.
    damping: asked for.
    unseen_are: what became of experts that were given no token, for the log.

  Raises:
    InputError: of the first matrix with a Hessian that could not be used.
  """
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(dict(reports))):
    return
  raised: list[str] = []
  unseen: list[str] = []
  for path, report in jax.device_get(dict(reports)).items():
    used, finite, used_damping, loss = map(np.asarray, report)
    config.require(bool(finite.all()), f"{path}: its Hessian is not finite")
    config.require(bool(used.any()), f"{path}: calibration gave it no token")
    config.require(
      bool(np.isfinite(loss).all()),
      f"{path}: no damping up to {used_damping.max():g} of the mean of its diagonal "
      "makes its Hessian positive definite, or the weight itself is not finite",
    )
    higher = np.asarray(used_damping > damping * (1 + 1e-6))  # float32 is inexact
    raised += [
      f"{at_name} to {used_damping[at]:g}" for at, at_name in _places(path, higher)
    ]
    unseen += [at_name for _, at_name in _places(path, np.asarray(~used))]
  log.info("%s: %d parameters, damping %g", name, len(reports), damping)
  if raised:
    log.warning(
      "%s: Hessians not positive definite; damping raised from %g for %s",
      name,
      damping,
      ", ".join(raised),
    )
  if unseen:
    log.warning("%s: no token seen, %s: %s", name, unseen_are, ", ".join(unseen))


def map_stack(one: Callable[[Any], Any], parts: Any, stack: tuple[int, ...]) -> Any:
  """`one` of each matrix of what is stacked.

  Args:
    one: of the parts of one matrix.
    parts: arrays `[*stack, ...]`, the first of them `[*stack, in, out]`.
    stack: may be empty.

  Returns:
    What `one` returned, stacked. As many are worked on at once as TOGETHER_BYTES says.
  """
  if not stack:
    return one(parts)
  first = jax.tree.leaves(parts)[0]
  total = math.prod(stack)
  most = TOGETHER_BYTES // (first.shape[-2] ** 2 * first.dtype.itemsize)
  together = column_sweep.block_size(total, max(most, 1))
  flat = jax.tree.map(lambda a: a.reshape(total, *a.shape[len(stack) :]), parts)
  made = jax.lax.map(one, flat, batch_size=together)
  return jax.tree.map(lambda a: a.reshape(*stack, *a.shape[1:]), made)


def _places(path: str, chosen: np.ndarray) -> list[tuple[tuple[int, ...], str]]:
  """Where on the stack of a parameter `chosen` is true, and the name of each place."""
  places = [tuple(map(int, at)) for at in np.argwhere(chosen)]
  return [(at, f"{path}[{', '.join(map(str, at))}]" if at else path) for at in places]
