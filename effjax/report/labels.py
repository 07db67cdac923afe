"""Places labels beside points so that they cover neither each other nor a point."""

from collections.abc import Sequence

Box = tuple[float, float, float, float]

# Ways around a point, in the order they are tried: right, left, above, below, corners.
_SIDES = (
  (1, 0),
  (-1, 0),
  (0, 1),
  (0, -1),
  (1, 1),
  (1, -1),
  (-1, 1),
  (-1, -1),
)


def place(
  points: Sequence[tuple[float, float]],
  sizes: Sequence[tuple[float, float]],
  bounds: Box,
  obstacles: Sequence[Box] = (),
  gap: float = 10.0,
) -> list[tuple[float, float]]:
  """The lower left corner of each label's box, greedily, first come first served.

  Args:
    points: pixels, y upwards.
    sizes: width and height of each label, pixels.
    bounds: left, bottom, right and top that labels stay within.
    obstacles: boxes of what else is drawn, such as `along` a line.
    gap: pixels from the middle of a point to its label.
  """
  taken: list[Box] = [
    (x - 0.7 * gap, y - 0.7 * gap, x + 0.7 * gap, y + 0.7 * gap) for x, y in points
  ]
  taken += obstacles
  corners = []
  for (x, y), (width, height) in zip(points, sizes, strict=True):
    options = []
    for distance in (1.0, 2.2, 3.6, 5.0):
      for i, (dx, dy) in enumerate(_SIDES):
        left = x + dx * gap * distance - (width if dx < 0 else 0)
        left -= width / 2 if dx == 0 else 0
        bottom = y + dy * gap * distance - (height if dy < 0 else 0)
        bottom -= height / 2 if dy == 0 else 0
        box = (left, bottom, left + width, bottom + height)
        cost = sum(_overlap(box, other) for other in taken)
        cost += 4 * _outside(box, bounds)
        options.append((cost, distance, i, box))
    best = min(options)[3]
    taken.append(best)
    corners.append(best[:2])
  return corners


def along(
  start: tuple[float, float], end: tuple[float, float], step: float = 6.0
) -> list[Box]:
  """Small boxes that cover a straight line."""
  (x0, y0), (x1, y1) = start, end
  num = max(int(max(abs(x1 - x0), abs(y1 - y0)) / step), 1)
  middles = [
    (x0 + (x1 - x0) * i / num, y0 + (y1 - y0) * i / num) for i in range(num + 1)
  ]
  half = step / 2
  return [(x - half, y - 2, x + half, y + 2) for x, y in middles]


def spread(heights: Sequence[float], gap: float) -> list[float]:
  """Heights moved apart to at least `gap`, in the same order, as little as needed."""
  order = sorted(range(len(heights)), key=lambda i: heights[i])
  groups: list[list[float]] = []  # Middle and number of each block of labels.
  for i in order:
    groups.append([heights[i], 1])
    while len(groups) > 1:
      (low, n), (high, m) = groups[-2:]
      if high - low >= gap * (n + m) / 2:
        break
      groups[-2:] = [[(low * n + high * m) / (n + m), n + m]]
  placed = [
    middle + gap * (k - (count - 1) / 2)
    for middle, count in groups
    for k in range(int(count))
  ]
  found = [0.0] * len(heights)
  for i, height in zip(order, placed, strict=True):
    found[i] = height
  return found


def _overlap(a: Box, b: Box) -> float:
  """Area two boxes share, pixels squared."""
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  return max(width, 0.0) * max(height, 0.0)


def _outside(box: Box, bounds: Box) -> float:
  """Area of a box beyond the bounds, pixels squared."""
  return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, bounds)
