"""What a compiled program sends between devices, read off its text.

Loops are counted as often as they run. TPU compilers write a reduce-scatter as a fusion
of an all-reduce and a slice, and start some collectives early; both are seen through.
XLA's compiler for CPUs never forms reduce-scatters: compile for a TPU to see them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
)

_BYTES = {"pred": 1, "c64": 8, "c128": 16}
_HEADER = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* {$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?[\w.-]+ = (.*)")
_SHAPE = re.compile(r"\b(pred|bf16|[fsuc]\d+\w*)\[([\d,]*)\]")
_OPERATION = re.compile(r"^(\(.*?\)|\S+) ([\w-]+)\(")
_CALLED = re.compile(
  r"\b(body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations={([^}]*)}")
_TRIPS = re.compile(r'known_trip_count[^\d]*"?(\d+)')
_FUSED_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program, on one device.

  Attributes:
    kind: one of KINDS.
    num_bytes: of the array that is gathered, reduced or sent, whole: the result of an
      all-gather, what goes into the others.
    group_size: devices that take part together; 2 of those that send to one other.
    times: how often it runs.
  """

  kind: str
  num_bytes: int
  group_size: int
  times: int

  @property
  def wire_bytes(self) -> float:
    """Bytes a device sends, all times together, by the usual ring algorithms."""
    if self.kind == "collective-permute":
      return float(self.num_bytes * self.times)
    passes = 2 if self.kind == "all-reduce" else 1
    share = (self.group_size - 1) / self.group_size
    return passes * share * self.num_bytes * self.times


def find(text: str) -> list[Collective]:
  """The collectives of a program.

  Args:
    text: `compiled.as_text()`.

  Raises:
    ValueError: it is written in a form that is not known here.
  """
  computations, entry = _computations(text)

  @functools.cache
  def inside(name: str) -> tuple[Collective, ...]:
    found = []
    for line in computations.get(name, ()):
      found += _of(line, computations, inside)
    return tuple(found)

  return list(inside(entry))


def totals(found: Iterable[Collective]) -> dict[str, dict[str, int | float]]:
  """By kind: `count` (times run), `num_bytes` and `wire_bytes` (times counted)."""
  table: dict[str, dict[str, int | float]] = {}
  for one in found:
    row = table.setdefault(one.kind, {"count": 0, "num_bytes": 0, "wire_bytes": 0.0})
    row["count"] += one.times
    row["num_bytes"] += one.num_bytes * one.times
    row["wire_bytes"] += one.wire_bytes
  return table


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of each computation by its name, and the name of the first to run."""
  found: dict[str, list[str]] = {}
  entry, current = "", None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = found.setdefault(header[1], [])
      entry = header[1] if line.startswith("ENTRY") else entry
    elif line == "}":
      current = None
    elif current is not None:
      current.append(line)
  return found, entry


def _of(
  line: str, computations: Mapping[str, list[str]], inside: object
) -> Iterator[Collective]:
  """The collectives of one instruction, and of what it calls."""
  matched = _INSTRUCTION.match(line)
  operation = _OPERATION.match(matched[1]) if matched else None
  if operation is None:
    return
  result, name = operation.groups()
  kind = name.removesuffix("-start")
  if kind in KINDS or kind == "ragged-all-to-all":
    kind = "all-to-all" if kind == "ragged-all-to-all" else kind
    size = _group_size(line)
    sizes = _sizes(result)
    # What starts early gives its operand and its result: of these the larger.
    whole = max(sizes) if name.endswith("-start") else sum(sizes)
    yield Collective(kind, whole * (size if kind == "reduce-scatter" else 1), size, 1)
    return
  called = [computation for _, computation in _CALLED.findall(line)]
  branches = _BRANCHES.search(line)
  if branches:
    called += [name.strip().lstrip("%") for name in branches[1].split(",")]
  times = _trip_count(line, computations) if name == "while" else 1
  for computation in called:
    if computation.startswith(_FUSED_SCATTER):
      yield from _fused_scatter(computations[computation])
      continue
    for one in inside(computation):
      yield dataclasses.replace(one, times=one.times * times)


def _fused_scatter(lines: list[str]) -> Iterator[Collective]:
  for line in lines:
    if " all-reduce(" in line:
      result = _OPERATION.match(_INSTRUCTION.match(line)[1])[1]
      size = _group_size(line)
      yield Collective("reduce-scatter", sum(_sizes(result)), size, 1)


def _trip_count(line: str, computations: Mapping[str, list[str]]) -> int:
  """How often a loop runs: said, or the constant its counter is compared with."""
  said = _TRIPS.search(line)
  if said:
    return int(said[1])
  condition = re.search(r"condition=%?([\w.-]+)", line)
  constants = [
    int(number)
    for inner in computations.get(condition[1], ())
    for number in re.findall(r"= s32\[\]\S* constant\((\d+)\)", inner)
  ]
  return max(constants, default=1)


def _sizes(shapes: str) -> list[int]:
  """Bytes of each array of a shape or of a tuple of them."""
  found = []
  for dtype, dims in _SHAPE.findall(shapes):
    bits = re.search(r"\d+", dtype)
    width = _BYTES.get(dtype) or max(1, int(bits[0]) // 8)
    found.append(width * math.prod(int(d) for d in dims.split(",") if d))
  return found


def _group_size(line: str) -> int:
  listed = re.search(r"replica_groups={{([\d,]+)}", line)
  if listed:
    return len(listed[1].split(","))
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
  if iota:
    return int(iota[2])
  named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*{([^}]*)}", line)
  if named:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
  if "source_target_pairs=" in line:
    return 2
  raise ValueError(f"how many devices take part in this is not known: {line[:300]}")
