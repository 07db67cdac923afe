"""How much longer published runs took than `roofline` says, as data.

`calibration.json` is what `effjax bench calibration --json` prints: MaxText's published
configs for v5e and v5p, compiled here with their sizes, sharding and recomputation.
"""

import dataclasses
import functools
import json
import statistics
from importlib import resources


@dataclasses.dataclass(frozen=True)
class Ratios:
  """Measured over predicted step times.

  Attributes:
    mean, low, high: over the published runs.
    count: how many.
  """

  mean: float
  low: float
  high: float
  count: int


@functools.cache
def ratios() -> Ratios:
  """Those that are kept with the package."""
  folder = resources.files("effjax.measure.pods")
  table = json.loads((folder / "calibration.json").read_text("utf-8"))
  found = [row["ratio"] for row in table["rows"]]
  return Ratios(statistics.mean(found), min(found), max(found), len(found))
