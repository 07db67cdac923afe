"""Programs as XLA's compilers write them, read from their text.

`read(compiled.as_text())` gives computations and their instructions with shapes, memory
spaces and how often loops run. What a program costs or sends is worked out from these.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

# Arrays are in the device's main memory unless their layout says otherwise.
MAIN_MEMORY = 0

_WIDTHS = {"pred": 8, "c64": 64, "c128": 128}
_HEADER = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* {$")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.-]+) = (.*)", re.DOTALL)
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+\w*)\[([\d,]*)\](?:{([^}]*)})?")
_OPERATION = re.compile(r"^(\(.*?\)|\S+) ([\w-]+)\(", re.DOTALL)
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
  r"\b(body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations={([^}]*)}")
_TRIPS = re.compile(r'known_trip_count[^\d]*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Array:
  """The shape of an array on one device.

  Attributes:
    dtype: as XLA names it, such as "bf16".
    dims: its sizes.
    bits: of an element, as it is stored.
    space: number of the memory it is in; MAIN_MEMORY or one of the chip's own.
  """

  dtype: str
  dims: tuple[int, ...]
  bits: int
  space: int

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def num_bytes(self) -> int:
    """Without padding."""
    return (self.size * self.bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the program.
    operation: such as "fusion".
    results: the array it makes, or those of the tuple it makes.
    operands: names of the instructions it reads.
    text: its operands and attributes.
    is_root: whether it is what its computation returns.
  """

  name: str
  operation: str
  results: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str
  is_root: bool

  @property
  def kind(self) -> str:
    """The operation, also where only its start is written."""
    return self.operation.removesuffix("-start")

  def called(self) -> Iterator[str]:
    """Names of the computations that run with it, loop conditions left out."""
    for _, name in _CALLED.findall(self.text):
      yield name
    branches = _BRANCHES.search(self.text)
    if branches:
      for name in branches[1].split(","):
        yield name.strip().lstrip("%")

  def attribute(self, name: str) -> str | None:
    """What stands behind `name=`, up to the next comma, brace by brace."""
    found = re.search(rf"\b{name}=({{[^}}]*}}|[^,\s]+)", self.text)
    return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Program:
  """A program for one device.

  Attributes:
    computations: instructions by the name of their computation.
    entry: the computation that runs first.
  """

  computations: Mapping[str, tuple[Instruction, ...]]
  entry: str

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    """Every instruction."""
    lines = self.computations.values()
    return {one.name: one for instructions in lines for one in instructions}

  def trip_count(self, loop: Instruction) -> int:
    """How often a loop runs: said, or the constant its counter is compared with."""
    said = _TRIPS.search(loop.text)
    if said:
      return int(said[1])
    condition = loop.attribute("condition")
    constants = [
      int(re.match(r"(\d+)\)", one.text)[1])
      for one in self.computations.get((condition or "").lstrip("%"), ())
      if one.operation == "constant" and one.results[0].dtype == "s32"
      if not one.results[0].dims
    ]
    return max(constants, default=1)

  def operand(self, instruction: Instruction, index: int) -> Array:
    """The array that an instruction reads at a place of its operands."""
    return self.by_name[instruction.operands[index]].results[0]


def read(text: str) -> Program:
  """A program from its text.

  Args:
    text: `compiled.as_text()`.
  """
  computations: dict[str, list[str]] = {}
  entry, current = "", None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations.setdefault(header[1], [])
      entry = header[1] if line.startswith("ENTRY") else entry
    elif line == "}":
      current = None
    elif current is not None and _INSTRUCTION.match(line):
      current.append(line)
    elif current:  # metadata of kernels goes over several lines
      current[-1] += "\n" + line
  parsed = {
    name: tuple(one for line in lines if (one := _instruction(line)))
    for name, lines in computations.items()
  }
  return Program(computations=parsed, entry=entry)


def _instruction(line: str) -> Instruction | None:
  root, name, rest = _INSTRUCTION.match(line).groups()
  operation = _OPERATION.match(rest)
  if operation is None:
    return None
  result, kind = operation.groups()
  text = rest[operation.end() :]
  return Instruction(
    name=name,
    operation=kind,
    results=tuple(arrays(result)),
    operands=tuple(_NAME.findall(text.partition(")")[0])),
    text=text,
    is_root=root is not None,
  )


def arrays(text: str) -> Iterator[Array]:
  """Each array of a shape or of a tuple of them."""
  for dtype, dims, layout in _ARRAY.findall(text):
    space = re.search(r"S\((\d+)\)", layout)
    packed = re.search(r"E\((\d+)\)", layout)
    width = _WIDTHS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    yield Array(
      dtype=dtype,
      dims=tuple(int(d) for d in dims.split(",") if d),
      bits=int(packed[1]) if packed else max(8, width),
      space=int(space[1]) if space else MAIN_MEMORY,
    )
