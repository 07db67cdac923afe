"""The metadata values of a GGUF file, each with the type it has in the file.

A type is written as "uint32", "string", ..., and "uint32[]" for an array. The elements
of "array[]" are arrays again, each a `Value` with a type of its own.
"""

import dataclasses
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from effjax.core import errors
from effjax.core.config import require

# Number in the file and letter in `struct`, which is NumPy's too.
SCALARS = {
  "uint8": (0, "B"),
  "int8": (1, "b"),
  "uint16": (2, "H"),
  "int16": (3, "h"),
  "uint32": (4, "I"),
  "int32": (5, "i"),
  "float32": (6, "f"),
  "bool": (7, "?"),
  "uint64": (10, "Q"),
  "int64": (11, "q"),
  "float64": (12, "d"),
}
STRING, ARRAY = 8, 9
NUMBERS = {
  **{name: number for name, (number, _) in SCALARS.items()},
  "string": STRING,
  "array": ARRAY,
}
NAMES = {number: name for name, number in NUMBERS.items()}
MAX_DEPTH = 4  # of arrays in arrays
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
  """A value and its type in the file.

  Attributes:
    type: "uint8" to "float64", "bool", "string", one of them with "[]", or "array[]".
    value: a Python scalar or string; for an array of numbers a NumPy array, for one of
      strings a list, for one of arrays a list of `Value`.
  """

  type: str
  value: Any

  @property
  def plain(self) -> Any:
    """The value without types, arrays in arrays as lists."""
    if self.type == "array[]":
      return [element.plain for element in self.value]
    return self.value


def dtype(name: str) -> np.dtype:
  """NumPy's little-endian type of a scalar."""
  return np.dtype("<" + SCALARS[name][1])


def infer(value: Any) -> Value:
  """A value with the type that llama.cpp would expect for it.

  Whole numbers from 0 become uint32 (negative ones int32, large ones 64 bits), floats
  float32; lists of whole numbers become int32 arrays; NumPy arrays keep their type.

  Raises:
    InputError: an empty list, a mixture, or a type that GGUF has not.
  """
  if isinstance(value, Value):
    return value
  if isinstance(value, np.ndarray | np.generic):
    name = value.dtype.name
    require(name in SCALARS, f"GGUF has no values of {name}; available: {_available()}")
    return Value(name, value.item()) if value.ndim == 0 else Value(f"{name}[]", value)
  if isinstance(value, list | tuple):
    kinds = {type(element) for element in value}
    lists = {bool: "bool", int: "int32", float: "float32", str: "string"}
    require(
      len(kinds) == 1 and kinds <= lists.keys(),
      "a list needs elements of one type (bool, int, float or str); give a Value else",
    )
    return Value(f"{lists[kinds.pop()]}[]", list(value))
  if isinstance(value, bool):
    return Value("bool", value)
  if isinstance(value, int):
    narrow, wide = ("uint32", "uint64") if value >= 0 else ("int32", "int64")
    return Value(narrow if -(2**31) <= value < 2**32 else wide, value)
  if isinstance(value, float):
    return Value("float32", value)
  require(isinstance(value, str), f"GGUF has no values of {type(value).__name__}")
  return Value("string", value)


def pack(value: Value) -> bytes:
  """A value as the file holds it, after the number of its type.

  Raises:
    InputError: a type GGUF has not, or a value outside its type.
  """
  element = value.type.removesuffix("[]")
  if element == value.type:
    require(element in NUMBERS and element != "array", _no_type(value.type))
    return struct.pack("<I", NUMBERS[element]) + _pack_scalar(element, value.value)
  return struct.pack("<I", ARRAY) + _pack_array(element, value, 1)


def pack_string(text: Any) -> bytes:
  """A length and UTF-8 bytes; InputError for what is no string."""
  require(isinstance(text, str), f"expected a string, got {_show(text)}")
  try:
    encoded = text.encode("utf-8")
  except UnicodeEncodeError:
    raise errors.InputError(f"{_show(text)} cannot be written as UTF-8") from None
  return struct.pack("<Q", len(encoded)) + encoded


def alignment(values: Mapping[str, Value]) -> int:
  """The alignment of tensor data that the metadata asks for.

  Raises:
    InputError: it is not a uint32 power of two up to `MAX_ALIGNMENT`.
  """
  value = values.get("general.alignment", Value("uint32", DEFAULT_ALIGNMENT))
  number = value.value
  require(
    value.type == "uint32"
    and isinstance(number, int)
    and 0 < number <= MAX_ALIGNMENT
    and number & (number - 1) == 0,
    f"general.alignment must be a uint32 power of two up to {MAX_ALIGNMENT}; got "
    f"{_show(number)} ({value.type})",
  )
  return number


def _pack_scalar(name: str, value: Any) -> bytes:
  if name == "string":
    return pack_string(value)
  if name == "bool":
    require(isinstance(value, bool | np.bool_), f"expected a bool, got {_show(value)}")
  try:
    return struct.pack("<" + SCALARS[name][1], value)
  except (struct.error, OverflowError):
    raise errors.InputError(f"{_show(value)} is not a {name}") from None


def _pack_array(element: str, value: Value, depth: int) -> bytes:
  """The number of the element's type, the count, and the elements."""
  require(depth <= MAX_DEPTH, f"arrays are nested more than {MAX_DEPTH} deep")
  require(element in NUMBERS, _no_type(value.type))
  if element in SCALARS:
    data = [_numbers(element, value.value).tobytes()]
    count = len(value.value)
  else:
    require(isinstance(value.value, list | tuple), f"{value.type} needs a list")
    count = len(value.value)
    if element == "string":
      data = [pack_string(text) for text in value.value]
    else:
      data = [_pack_inner(inner, depth + 1) for inner in value.value]
  return struct.pack("<IQ", NUMBERS[element], count) + b"".join(data)


def _pack_inner(value: Any, depth: int) -> bytes:
  require(
    isinstance(value, Value) and value.type.endswith("[]"),
    "elements of array[] are Values of array types",
  )
  return _pack_array(value.type.removesuffix("[]"), value, depth)


def _numbers(name: str, value: Any) -> np.ndarray:
  """A vector of numbers in its type in the file, if it holds them."""
  message = f"{_show(value)} is not a vector of {name}"
  wanted = dtype(name)
  try:
    given = np.asarray(value, dtype=None if len(value) else wanted)
  except (TypeError, ValueError, OverflowError):
    raise errors.InputError(message) from None
  require(given.ndim == 1, message)
  if given.dtype == wanted:
    return np.ascontiguousarray(given, wanted)
  kinds = {"f": "fiu", "b": "b"}.get(wanted.kind, "iu")
  require(given.dtype.kind in kinds, message)
  with np.errstate(all="ignore"):
    cast = given.astype(wanted)
  if wanted.kind == "f":
    require(np.array_equal(np.isfinite(cast), np.isfinite(given)), message)
  else:
    require([int(x) for x in cast] == [int(x) for x in given], message)
  return cast


def _available() -> str:
  return ", ".join(SCALARS)


def _no_type(name: str) -> str:
  return f"GGUF has no type {name!r}; available: string, {_available()}, each with []"


def _show(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."
