"""A real model pruned: which score loses how much, at 30, 50 and 70 % and 2:4.

What it is judged on: experiments/cells.py. Fetches the model and the texts the first
time.
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
  return (
    Cell(magnitude, (("magnitude", options | _EVEN),)),
    Cell(wanda, (("wanda", options),), (magnitude,)),
    Cell(sparsegpt, (("sparsegpt", options),), (wanda,)),
  )


SMOLLM2 = tuple(
  cell for amount, options in _AMOUNTS.items() for cell in _cells(amount, options)
)
OTHER_BUDGETS = (
  Cell("magnitude-50-global", (("magnitude", {}),), ("magnitude-50",)),
  Cell("wanda-50-owl", (("wanda", {"budget": "owl"}),), ("wanda-50",)),
)

if __name__ == "__main__":
  cells.main(__doc__, [("smollm2", SMOLLM2, OTHER_BUDGETS, cells.Language)])
