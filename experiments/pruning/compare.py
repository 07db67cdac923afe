"""A real model pruned: which score loses how much, at 30, 50 and 70 % and 2:4.

And by whole groups, after which it is smaller. What it is judged on:
experiments/cells.py. Fetches the model and the texts the first time.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import cells
from experiments.cells import Cell

_EVEN = {"budget": "uniform"}
_AMOUNTS = {
  "30": {"sparsity": 0.3},
  "50": {"sparsity": 0.5},
  "70": {"sparsity": 0.7},
  "2of4": {"pattern": "2:4"},
}


def _cells(amount, options):
  """Magnitude, Wanda beside it, and SparseGPT beside Wanda."""
  magnitude, wanda, sparsegpt = (
    f"{name}-{amount}" for name in ("magnitude", "wanda", "sparsegpt")
  )
  yield Cell(magnitude, (("magnitude", options | _EVEN),))
  for draw in range(cells.DRAWS):
    nth = f"-draw{draw}" if draw else ""
    yield Cell(wanda + nth, (("wanda", options),), (magnitude,), draw)
    beside = (wanda + nth,)
    yield Cell(sparsegpt + nth, (("sparsegpt", options),), beside, draw)


def _groups(groups, share, scores):
  """Whole groups by several scores, each beside the first."""
  first = f"{groups}-{scores[0]}"
  for score in scores:
    options = {"groups": groups, "sparsity": share, "score": score}
    beside = () if score == scores[0] else (first,)
    yield Cell(f"{groups}-{score}", (("structured", options),), beside)


SMOLLM2 = tuple(
  cell for amount, options in _AMOUNTS.items() for cell in _cells(amount, options)
)
STRUCTURED = (
  *_groups("neurons", 0.25, ("magnitude", "wanda", "taylor", "fisher")),
  *_groups("kv_groups", 0.34, ("magnitude", "wanda", "taylor", "fisher")),
  *_groups("layers", 0.2, ("magnitude", "influence", "taylor")),
)
OTHER_BUDGETS = (
  Cell("magnitude-50-global", (("magnitude", {}),), ("magnitude-50",)),
  Cell("wanda-50-owl", (("wanda", {"budget": "owl"}),), ("wanda-50",)),
)

if __name__ == "__main__":
  known = ("smollm2", SMOLLM2 + STRUCTURED, OTHER_BUDGETS, cells.Language)
  cells.main(__doc__, [known])
