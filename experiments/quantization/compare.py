"""Real models quantized: which format, rounding and transform loses how much.

What they are judged on: experiments/cells.py. Fetches both models and texts the first
time.
"""

import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import cells
from experiments.cells import Cell


def _int(bits: int, group: int, **more: Any) -> dict[str, Any]:
  return {"bits": bits, "group": group, **more}


W4A4 = {"bits": 4, "group": 0, "activations": "int4"}
SMOLLM2 = (
  Cell("int4-g32", (("rtn", _int(4, 32)),), ("int4-g64",)),
  Cell("int4-g64", (("rtn", _int(4, 64)),), ("int4-g192",)),
  Cell("int4-g192", (("rtn", _int(4, 192)),), ("int4-channel",)),
  Cell("int4-channel", (("rtn", _int(4, 0)),)),
  Cell("nf4-g64", (("rtn", {"format": "nf4", "group": 64}),), ("int4-g64",)),
  Cell("int4-g64-gptq", (("gptq", _int(4, 64)),), ("int4-g64",)),
  Cell("int4-g64-awq", (("awq", _int(4, 64)), ("rtn", _int(4, 64))), ("int4-g64",)),
  Cell("int3-g64", (("rtn", _int(3, 64)),)),
  Cell("int3-g64-gptq", (("gptq", _int(3, 64)),), ("int3-g64",)),
  Cell("int3-g64-awq", (("awq", _int(3, 64)), ("rtn", _int(3, 64))), ("int3-g64",)),
  Cell("w4a4", (("rtn", W4A4),)),
  Cell("w4a4-rotated", (("rotation", {}), ("rtn", W4A4)), ("w4a4",)),
)
# Run only by name: why GPTQ does not help at 4 bits.
_REST = {"kind": "matrix", "not_path": "down"}
_DOWN = {"kind": "matrix", "path": "down"}
EXPLAINING = (
  Cell(
    "int4-g64-gptq-order",
    (("gptq", _int(4, 64, act_order=True)),),
    ("int4-g64",),
  ),
  Cell(
    "int4-g64-gptq-down",
    (("gptq", _int(4, 64), _DOWN), ("rtn", _int(4, 64), _REST)),
    ("int4-g64",),
  ),
  Cell(
    "int4-g64-gptq-rest",
    (("gptq", _int(4, 64), _REST), ("rtn", _int(4, 64), _DOWN)),
    ("int4-g64",),
  ),
  Cell("int4-g64-mse", (("rtn", _int(4, 64, range="mse")),), ("int4-g64",)),
  Cell("int4-g64-gptq-mse", (("gptq", _int(4, 64, range="mse")),), ("int4-g64",)),
)
MINILM = (
  Cell("int4-g32", (("rtn", _int(4, 32)),), ("int4-g64",)),
  Cell("int4-g64", (("rtn", _int(4, 64)),), ("int4-g192",)),
  Cell("int4-g192", (("rtn", _int(4, 192)),), ("int4-channel",)),
  Cell("int4-channel", (("rtn", _int(4, 0)),)),
  Cell("nf4-g64", (("rtn", {"format": "nf4", "group": 64}),), ("int4-g64",)),
  Cell("int4-g64-gptq", (("gptq", _int(4, 64)),), ("int4-g64",)),
  Cell("int3-g64", (("rtn", _int(3, 64)),)),
  Cell("int3-g64-gptq", (("gptq", _int(3, 64)),), ("int3-g64",)),
)


if __name__ == "__main__":
  cells.main(
    __doc__,
    [
      ("smollm2", SMOLLM2, EXPLAINING, cells.Language),
      ("minilm", MINILM, (), cells.Sentences),
    ],
  )
