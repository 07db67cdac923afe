"""FLOPs of the kernels that are opaque to a compiler's text.

Splash attention (effjax.ops.attention.splash) names how much of the square of queries
and keys it visits; a forward pass multiplies that part twice (scores, values), the
gradients of keys and values four times, those of queries three times, as each forms the
scores again.
"""

import math
import re

from effjax.parallel import hlo

_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
_FLOATS = ("bf16", "f32")
_VISITED = re.compile(r"visits_(\d+)_of_(\d+)")


def flops(one: hlo.Instruction, program: hlo.Program) -> int | None:
  """FLOPs of a kernel; None for one that is not known.

  Args:
    one: a custom call of the program.
    program: the program.
  """
  if "ragged" in one.text.split("custom_call_target=")[-1][:60]:
    return _ragged(one, program)
  products = next((n for key, n in _PRODUCTS.items() if one.name.startswith(key)), None)
  if products is None:
    return None
  operands = (program.by_name[name].results[0] for name in one.operands)
  q, k, *_ = (array for array in operands if array.dtype in _FLOATS)
  *rows_and_heads, length, width = q.dims
  scores = math.prod(rows_and_heads) * length * k.dims[-2]
  visited = _VISITED.search(one.text)
  part = int(visited[1]) / int(visited[2]) if visited else 1.0
  return round(2 * products * scores * width * part)


def _ragged(one: hlo.Instruction, program: hlo.Program) -> int:
  """Rows times the size of one group's matrix: every row meets one."""
  rows, matrices = (program.operand(one, i) for i in range(2))
  result = one.results[0]
  if len(matrices.dims) == 3:
    return 2 * rows.dims[0] * math.prod(matrices.dims[1:])
  return 2 * rows.dims[0] * math.prod(result.dims[1:])


def is_kernel(one: hlo.Instruction) -> bool:
  """Whether a custom call computes something."""
  if one.operation != "custom-call":
    return False
  target = re.search(r'custom_call_target="([^"]*)"', one.text)
  return target is not None and (
    target[1] == "tpu_custom_call" or "ragged" in target[1].lower()
  )
