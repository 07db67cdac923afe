"""What a compiled program sends between devices, read off its text.

Loops are counted as often as they run. TPU compilers write a reduce-scatter as a fusion
of an all-reduce and a slice, and start some collectives early; both are seen through.
XLA's compiler for CPUs never forms reduce-scatters: compile for a TPU to see them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from effjax.parallel import hlo

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
)
_FUSED_SCATTER = "all-reduce-scatter"
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program, on one device.

  Attributes:
    kind: one of KINDS.
    num_bytes: of the array that is gathered, reduced or sent, whole: the result of an
      all-gather, what goes into the others.
    groups: the first of the groups of devices that take part together; of a
      collective-permute all pairs of a sender and a receiver.
    times: how often it runs.
  """

  kind: str
  num_bytes: int
  groups: tuple[tuple[int, ...], ...]
  times: int

  @property
  def group_size(self) -> int:
    """Devices that take part together; 2 of those that send to one other."""
    return len(self.groups[0])

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
  program = hlo.read(text)

  @functools.cache
  def inside(name: str) -> tuple[Collective, ...]:
    found: list[Collective] = []
    for one in program.computations.get(name, ()):
      direct = list(of(one, program))
      found += direct
      if direct:
        continue
      times = program.trip_count(one) if one.operation == "while" else 1
      for called in one.called():
        found += (dataclasses.replace(c, times=c.times * times) for c in inside(called))
    return tuple(found)

  return list(inside(program.entry))


def of(one: hlo.Instruction, program: hlo.Program) -> Iterator[Collective]:
  """The collectives that an instruction is, or is a fusion of; not of what it loops."""
  kind = "all-to-all" if one.kind == "ragged-all-to-all" else one.kind
  if kind in KINDS:
    sizes = [array.num_bytes for array in one.results]
    groups = _groups(one.text)
    # What starts early gives its operand and its result: of these the larger.
    whole = max(sizes) if one.operation.endswith("-start") else sum(sizes)
    if kind == "reduce-scatter":
      whole *= len(groups[0])
    yield Collective(kind, whole, groups, 1)
    return
  for called in one.called():
    if called.startswith(_FUSED_SCATTER):
      for inner in program.computations[called]:
        if inner.operation == "all-reduce":
          whole = sum(array.num_bytes for array in inner.results)
          yield Collective("reduce-scatter", whole, _groups(inner.text), 1)


def totals(found: Iterable[Collective]) -> dict[str, dict[str, int | float]]:
  """By kind: `count` (times run), `num_bytes` and `wire_bytes` (times counted)."""
  table: dict[str, dict[str, int | float]] = {}
  for one in found:
    row = table.setdefault(one.kind, {"count": 0, "num_bytes": 0, "wire_bytes": 0.0})
    row["count"] += one.times
    row["num_bytes"] += one.num_bytes * one.times
    row["wire_bytes"] += one.wire_bytes
  return table


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
  """The first group of devices that talk to each other, or all pairs of a permute."""
  pairs = re.search(r"source_target_pairs={({[\d,{}]*})}", text)
  if pairs:
    return tuple(_ints(pair) for pair in re.findall(r"{([\d,]+)}", pairs[1]))
  listed = re.search(r"replica_groups={{([\d,]+)}", text)
  if listed:
    return (_ints(listed[1]),)
  counted = re.search(r"replica_groups=(\[\d[^ ]*)", text)
  if counted:
    return (tuple(_iota(counted[1])[0].tolist()),)
  named = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*){([^}]*)}", text)
  if named:
    sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
    order = re.search(r"device_ids=\((.*)\)", named[2])
    devices = _iota(order[1]) if order else np.arange(math.prod(sizes.values()))
    taken = re.findall(r"'([^']+)'", named[3])
    first = tuple(slice(None) if axis in taken else 0 for axis in sizes)
    return (tuple(devices.reshape(tuple(sizes.values()))[first].ravel().tolist()),)
  raise ValueError(f"how many devices take part in this is not known: {text[:300]}")


def _iota(text: str) -> np.ndarray:
  """Numbers from 0 in the order that XLA writes as "[4,2]<=[2,4]T(1,0)"."""
  shape, dims, order = _IOTA.match(text).groups()
  numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(dims or shape))
  if order:
    numbers = numbers.transpose(_ints(order))
  return numbers.reshape(_ints(shape)) if dims else numbers


def _ints(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(",") if n)
