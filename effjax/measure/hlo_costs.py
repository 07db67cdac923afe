"""FLOPs of an instruction of a compiled program, and the bytes it moves in memory.

Products are counted where they are written, loops not multiplied: who walks a program
knows how often each computation runs (effjax.measure.pods.walk).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from effjax.parallel import hlo

# These name arrays or move none.
_FREE = frozenset(
  (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "while",
    "conditional",
    "call",
    "copy-done",
    "slice-done",
    "async-done",
    "async-update",
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
    "send-done",
    "recv-done",
  )
)
# What changes a part of its first operand where it is, and which operand the part is.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# Custom calls that only say something of an array.
_HINTS = ("AssumeGatherIndicesInBound", "ConcatBitcast", "AllocateBuffer", "Sharding")


def dots(text: str) -> Iterator[tuple[tuple[int, ...], int]]:
  """Shape of the result and FLOPs of every `dot`, each as often as it is written.

  A dot in the body of a loop, or in one of several branches, is written once.

  Args:
    text: `compiled.as_text()`.
  """
  program = hlo.read(text)
  for instructions in program.computations.values():
    for one in instructions:
      if one.operation == "dot":
        yield one.results[0].dims, _dot(one, program)


def products(one: hlo.Instruction, program: hlo.Program) -> Iterator[tuple[str, int]]:
  """Type of the operands and FLOPs of each matrix product, those of a fusion included.

  Kernels are not seen into: see `effjax.measure.pods.kernels`.
  """
  if one.operation == "dot":
    yield program.operand(one, 0).dtype, _dot(one, program)
  elif one.operation == "convolution":
    yield program.operand(one, 0).dtype, _convolution(one, program)
  elif one.operation == "fusion":
    for name in one.called():
      for inner in program.computations.get(name, ()):
        yield from products(inner, program)


def memory_bytes(one: hlo.Instruction, program: hlo.Program) -> int:
  """Bytes read from and written to main memory; of slices only what they touch."""
  if one.operation in _FREE or _is_hint(one):
    return 0
  if one.operation == "fusion":
    inner = program.computations[next(one.called())]
    return _read(inner, program) + _written(one, inner, program)
  operands = [
    array
    for name in one.operands
    if name in program.by_name
    for array in program.by_name[name].results
  ]
  if one.operation.endswith("-start"):
    # What starts gives its operand back beside its result, which may be a slice of it.
    moved = [array for array in one.results if array.dims]
    in_main = sum(array.space == hlo.MAIN_MEMORY for array in moved)
    return min((array.num_bytes for array in moved), default=0) * in_main
  if one.operation in ("dynamic-slice", "slice", "gather"):
    return 2 * sum(map(_in_main, one.results))
  if one.operation in _UPDATES:
    return 2 * _in_main(operands[_UPDATES[one.operation]])
  return sum(map(_in_main, operands)) + sum(map(_in_main, one.results))


def _in_main(array: hlo.Array) -> int:
  return array.num_bytes if array.space == hlo.MAIN_MEMORY else 0


def _is_hint(one: hlo.Instruction) -> bool:
  if one.operation != "custom-call":
    return False
  target = re.search(r'custom_call_target="([^"]*)"', one.text)
  return target is not None and target[1] in _HINTS


def _read(inner: Sequence[hlo.Instruction], program: hlo.Program) -> int:
  """Bytes that a fusion reads of its parameters."""
  held = (one for one in inner if one.operation == "parameter")
  return sum(
    _touched_of(one, inner, program) for one in held if _in_main(one.results[0])
  )


def _touched_of(
  array: hlo.Instruction, inner: Sequence[hlo.Instruction], program: hlo.Program
) -> int:
  """Bytes that a computation reads of one of its arrays, whichever memory it is in."""
  whole, total = array.results[0].num_bytes, 0
  for user in inner:
    for place, name in enumerate(user.operands):
      if name == array.name:
        total += _touched_by(user, place, whole, inner, program)
  return min(whole, total)


def _touched_by(
  user: hlo.Instruction,
  place: int,
  whole: int,
  inner: Sequence[hlo.Instruction],
  program: hlo.Program,
) -> int:
  """Bytes that an instruction reads of its operand at a place."""
  if user.operation == "bitcast":
    return _touched_of(user, inner, program)
  if user.operation in ("dynamic-slice", "slice", "gather") and place == 0:
    return user.results[0].num_bytes
  if user.operation in _UPDATES and place == 0:
    return 0  # It is changed where it is.
  if user.operation == "fusion":
    called = program.computations[next(user.called())]
    for one in called:
      if one.operation == "parameter" and one.text.startswith(f"{place})"):
        if _is_all_of(called, one):
          return _touched_of(user, inner, program)
        return _touched_of(one, called, program)
  return whole


def _is_all_of(inner: Sequence[hlo.Instruction], array: hlo.Instruction) -> bool:
  """Whether a computation returns one of its arrays, under another shape perhaps."""
  by_name = {one.name: one for one in inner}
  made = next(one for one in inner if one.is_root)
  while made.operation == "bitcast":
    made = by_name[made.operands[0]]
  return made is array


def _written(
  fusion: hlo.Instruction, inner: Sequence[hlo.Instruction], program: hlo.Program
) -> int:
  """Bytes that a fusion writes of its results."""
  root = next(one for one in inner if one.is_root)
  by_name = {one.name: one for one in inner}
  made = [root]
  if root.operation == "tuple":
    made = [by_name[name] for name in root.operands]
  total = 0
  for one, result in zip(made, fusion.results, strict=False):
    if result.space == hlo.MAIN_MEMORY:
      total += _written_by(one, by_name, program)
  return total


def _written_by(
  one: hlo.Instruction, by_name: Mapping[str, hlo.Instruction], program: hlo.Program
) -> int:
  """Bytes that change in what an instruction makes."""
  while one.operation == "bitcast" and one.operands[0] in by_name:
    one = by_name[one.operands[0]]
  if one.operation in _UPDATES:
    return program.operand(one, _UPDATES[one.operation]).num_bytes
  if one.operation == "fusion":
    inner = {i.name: i for i in program.computations[next(one.called())]}
    root = next(i for i in inner.values() if i.is_root)
    if root.operation != "tuple":
      return _written_by(root, inner, program)
  return sum(array.num_bytes for array in one.results)


def _dot(one: hlo.Instruction, program: hlo.Program) -> int:
  left = program.operand(one, 0)
  axes = re.search(r"lhs_contracting_dims={([\d,]*)}", one.text)
  contracted = math.prod(left.dims[int(a)] for a in axes[1].split(",") if a)
  return 2 * one.results[0].size * contracted


def _convolution(one: hlo.Instruction, program: hlo.Program) -> int:
  """TPU compilers write products as convolutions, batch axes as spatial ones.

  What multiplies padding is not counted.
  """
  left, right = program.operand(one, 0), program.operand(one, 1)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.text)
  in_l, in_r, out = labels.groups()
  groups = int(one.attribute("feature_group_count") or 1)
  batches = int(one.attribute("batch_group_count") or 1)
  pairs = 2 * left.dims[in_l.index("b")] // batches
  pairs *= left.dims[in_l.index("f")] // groups
  pairs *= right.dims[in_r.index("o")]
  window = _window(one.text)
  for axis in sorted(set(in_l) - {"b", "f"}):
    pairs *= _touched(
      left.dims[in_l.index(axis)],
      one.results[0].dims[out.index(axis)],
      **{key: sizes[int(axis)] for key, sizes in window.items()},
    )
  return pairs


def _window(text: str) -> dict[str, list]:
  found = re.search(r"window={([^}]*)}", text)
  given = dict(re.findall(r"(\w+)=(\S+)", found[1])) if found else {}
  rank = len(given.get("size", "").split("x")) if "size" in given else 0
  ints = lambda key: [int(n) for n in given.get(key, "x".join("1" * rank)).split("x")]
  pads = given.get("pad", "x".join(["0_0"] * rank)).split("x")
  if not rank:
    return {}
  return {
    "size": ints("size"),
    "stride": ints("stride"),
    "left": ints("lhs_dilate"),
    "right": ints("rhs_dilate"),
    "pad": [int(pad.split("_")[0]) for pad in pads],
  }


def _touched(
  num_in: int,
  num_out: int,
  size: int = 1,
  stride: int = 1,
  left: int = 1,
  right: int = 1,
  pad: int = 0,
) -> int:
  """Pairs of a place of the result and one of the window that meet an input."""
  at = np.arange(num_out)[:, None] * stride + np.arange(size) * right - pad
  inside = (at >= 0) & (at <= (num_in - 1) * left) & (at % left == 0)
  return int(inside.sum())
