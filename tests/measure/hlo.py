"""FLOPs of the `dot` operations in the text of an unoptimized HLO module."""

import math
import re

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$")
_OP = re.compile(
  r"^\s+(?:ROOT )?%?([\w.\-]+) = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(([^)]*)\)(.*)$"
)
_NAME = re.compile(r"%?([\w.\-]+)$")


def dot_flops(text: str) -> int:
  """FLOPs of an HLO module; called computations count once for each call."""
  bodies: dict[str, list[str]] = {}
  entry = name = ""
  for line in text.splitlines():
    if header := _HEADER.match(line):
      name = header.group(2)
      bodies[name] = []
      entry = name if header.group(1) else entry
    elif name:
      bodies[name].append(line)
  return _flops(entry, bodies)


def _flops(name: str, bodies: dict[str, list[str]]) -> int:
  total = 0
  shapes = {}
  for line in bodies[name]:
    op = _OP.match(line)
    if op is None:
      # Operations with tuple results still call.
      for callee in re.findall(r" call\(.*to_apply=%?([\w.\-]+)", line):
        total += _flops(callee, bodies)
      continue
    result, _, dims, kind, operands, rest = op.groups()
    shapes[result] = [int(d) for d in dims.split(",") if d]
    if kind == "call":
      total += _flops(re.search(r"to_apply=%?([\w.\-]+)", rest).group(1), bodies)
    elif kind == "dot":
      lhs = _NAME.search(operands.split(",")[0].strip()).group(1)
      axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest).group(1)
      depth = math.prod(shapes[lhs][int(a)] for a in axes.split(",") if a)
      total += 2 * depth * math.prod(shapes[result])
  return total
