"""What a trade-off can be plotted against, and which points are on its front."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
  """A number of a row, on an axis.

  Attributes:
    key: name in the data of a page.
    label: what stands beside the axis, with the unit.
    value: the number of a row, None where it has none.
    higher_is_better: False for costs.
    off_scale: values beyond this many times the best are drawn at the edge, so that
      one broken model does not squeeze all others together; None for no limit.
  """

  key: str
  label: str
  value: Callable[[Row], float | None]
  higher_is_better: bool = False
  off_scale: float | None = None


def _field(name: str, scale: float = 1.0) -> Callable[[Row], float | None]:
  return lambda row: None if row[name] is None else float(row[name]) * scale


def _quality(name: str) -> Callable[[Row], float | None]:
  def value(row: Row) -> float | None:
    found = row["quality"].get(name)
    return None if found is None else float(found)

  return value


COSTS = (
  Axis(key="bits", label="bits per weight", value=_field("bits_per_weight")),
  Axis(key="held", label="MB held", value=_field("bytes_held", 1e-6)),
  Axis(key="disk", label="MB on disk", value=_field("bytes_on_disk", 1e-6)),
  Axis(key="decode", label="decode ms/token (p50)", value=_field("decode_ms_p50")),
  Axis(key="prefill", label="prefill ms", value=_field("prefill_ms")),
  Axis(
    key="executed",
    label="executed MFLOPs/token",
    value=_field("flops_executed_per_token", 1e-6),
  ),
  Axis(
    key="theoretical",
    label="theoretical MFLOPs/token",
    value=_field("flops_per_token", 1e-6),
  ),
)
QUALITIES = (
  Axis(
    key="bpb", label="bits per byte", value=_quality("bits_per_byte"), off_scale=1.4
  ),
  Axis(
    key="ppl", label="perplexity per token", value=_quality("perplexity"), off_scale=4.0
  ),
  Axis(
    key="accuracy",
    label="accuracy",
    value=_quality("accuracy"),
    higher_is_better=True,
  ),
)


def limit(axis: Axis, values: Sequence[float]) -> float:
  """The largest value drawn at its place; what is beyond goes to the edge."""
  if axis.off_scale is None:
    return max(values)
  bound = axis.off_scale * min(values)
  return max(value for value in values if value <= bound)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
  """Indices of the points no other point beats on both axes, by x.

  Args:
    points: (cost, loss), both better when lower.

  Returns:
    For equal points the first one; sorted by cost.
  """
  order = sorted(range(len(points)), key=lambda i: (points[i], i))
  chosen: list[int] = []
  best = float("inf")
  for i in order:
    if points[i][1] < best:
      chosen.append(i)
      best = points[i][1]
  return chosen
