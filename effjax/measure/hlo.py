"""Matrix products of a compiled program, read off its text."""

import math
import re
from collections.abc import Iterator

# `%name = f32[32,8]{1,0} ...`: what every instruction makes.
_SHAPE = re.compile(r"(%[\w.-]+) = \w+\[([\d,]*)\]")
_DOT = re.compile(
  r"= \w+\[([\d,]*)\]\S* dot\((%[\w.-]+), .*lhs_contracting_dims={([\d,]*)}"
)


def dots(text: str) -> Iterator[tuple[tuple[int, ...], int]]:
  """Shape of the result and FLOPs of every `dot`, each as often as it is written.

  A dot in the body of a loop, or in one of several branches, is written once: how often
  it runs, the text does not say.

  Args:
    text: `compiled.as_text()`.
  """
  shapes = {name: _sizes(sizes) for name, sizes in _SHAPE.findall(text)}
  for sizes, left, axes in _DOT.findall(text):
    result = _sizes(sizes)
    contracted = math.prod(shapes[left][axis] for axis in _sizes(axes))
    yield result, 2 * math.prod(result) * contracted


def _sizes(text: str) -> tuple[int, ...]:
  return tuple(int(size) for size in text.split(",") if size)
