"""pareto.png: size against quality, with the compressors as lines."""

import itertools
import os
from collections.abc import Sequence

import matplotlib.figure
from matplotlib import patheffects
from matplotlib.backends import backend_agg

from effjax.report import axes as axes_lib
from effjax.report import labels, markdown
from effjax.report import result as result_lib

_COLORS = ("#2563b0", "#c2571a", "#1f8055", "#8146ad", "#b0355a", "#6f6c14")
_WORSE = "#b3261e"
_GREY = "#6a6a6a"

Point = tuple[float, float]


def save_pareto(
  path: str | os.PathLike, results: Sequence[result_lib.Result], cost: str = "bits"
) -> bool:
  """Draws the trade-off of a cost and quality into a PNG.

  Hollow points are simulated: part of what they promise is not saved here. A point far
  off the scale stands at the upper edge, with its value.

  Args:
    path: file to write.
    results: one or several runs.
    cost: key of one of axes.COSTS.

  Returns:
    Whether there was anything to draw.
  """
  x_axis = next(axis for axis in axes_lib.COSTS if axis.key == cost)
  rows = [(i, row) for i, result in enumerate(results) for row in result.stages]
  for y_axis in axes_lib.QUALITIES:
    found = [(i, row) for i, row in rows if _point(x_axis, y_axis, row) is not None]
    if found:
      break
  else:
    return False
  points = [_point(x_axis, y_axis, row) for _, row in found]
  lines = markdown.references(results) if y_axis.key == "bpb" else []
  figure = matplotlib.figure.Figure(figsize=(8.8, 5.2), dpi=150)
  canvas = backend_agg.FigureCanvasAgg(figure)
  ax = figure.add_axes((0.08, 0.11, 0.9 - 0.13 * bool(lines), 0.82))
  limit = axes_lib.limit(y_axis, [y for _, y in points])
  _set_limits(ax, points, limit, [bits for _, bits in lines])
  top = ax.get_ylim()[1]
  drawn = [(x, y if y <= limit else top) for x, y in points]
  sign = -1 if y_axis.higher_is_better else 1
  front = axes_lib.front([(x, sign * y) for x, y in points])
  front_xs, front_ys = [drawn[i][0] for i in front], [drawn[i][1] for i in front]
  ax.plot(front_xs, front_ys, color="#555555", lw=1.2, zorder=2)
  several = len(results) > 1
  for k, ((i, row), at) in enumerate(zip(found, drawn, strict=True)):
    best = _COLORS[i % len(_COLORS)]
    color = best if several or k in front else _WORSE
    face = "white" if row["simulated"] else color
    marker = "^" if points[k][1] > limit else "o"
    ax.plot(*at, marker, ms=7, mec=color, mfc=face, mew=1.6, zorder=3, clip_on=False)
  names = [
    (f"{results[i].name}/" if several else "")
    + row["stage"]
    + (f" ({y:.2f}, off the scale)" if y > limit else "")
    for (i, row), (_, y) in zip(found, points, strict=True)
  ]
  _decorate(ax, x_axis, y_axis, several)
  _draw_references(figure, ax, lines)
  _draw_names(figure, canvas, ax, drawn, names, front, lines)
  figure.savefig(path, format="png", metadata={"Software": None})
  return True


def _point(
  x_axis: axes_lib.Axis, y_axis: axes_lib.Axis, row: axes_lib.Row
) -> Point | None:
  x, y = x_axis.value(row), y_axis.value(row)
  return None if x is None or y is None else (x, y)


def _set_limits(
  ax, points: Sequence[Point], limit: float, lines: Sequence[float]
) -> None:
  xs = [x for x, _ in points]
  ys = [y for _, y in points if y <= limit] + list(lines)
  for values, setter in ((xs, ax.set_xlim), (ys, ax.set_ylim)):
    low, high = min(values), max(values)
    pad = 0.1 * (high - low) or 0.1 * abs(high) or 1
    setter(max(low - pad, 0) if low >= 0 else low - pad, high + pad)


def _decorate(ax, x_axis: axes_lib.Axis, y_axis: axes_lib.Axis, several: bool) -> None:
  better = "higher" if y_axis.higher_is_better else "lower"
  ax.set_xlabel(f"{x_axis.label} (lower is better)")
  ax.set_ylabel(f"{y_axis.label} ({better} is better)")
  ax.grid(color="#e6e6e6", lw=0.6)
  ax.set_axisbelow(True)
  ax.spines[["top", "right"]].set_visible(False)
  meaning = "blue: on the front   red: another row is at least as good on both   "
  ax.set_title(
    ("" if several else meaning)
    + "line: Pareto front   hollow: simulated   dashed: compressors",
    loc="left",
    fontsize=8,
    color=_GREY,
  )


def _draw_references(figure, ax, lines: Sequence[tuple[str, float]]) -> None:
  """Dashed lines, their names in the margin, moved apart where they are close."""
  if not lines:
    return
  to_pixels = lambda bits: ax.transData.transform((0, bits))[1]
  heights = labels.spread([to_pixels(bits) for _, bits in lines], gap=22.0)
  invert = ax.transAxes.inverted()
  for (name, bits), height in zip(lines, heights, strict=True):
    ax.axhline(bits, color=_GREY, lw=0.9, ls=(0, (4, 3)), zorder=1)
    y = invert.transform((0, height))[1]
    line_y = invert.transform((0, to_pixels(bits)))[1]
    ax.plot(
      [1, 1.012],
      [line_y, y],
      color=_GREY,
      lw=0.7,
      transform=ax.transAxes,
      clip_on=False,
    )
    ax.text(
      1.017,
      y,
      f"{markdown.short(name)} {bits:.3f}",
      transform=ax.transAxes,
      va="center",
      fontsize=8,
      color=_GREY,
    )


def _draw_names(
  figure,
  canvas,
  ax,
  points: Sequence[Point],
  names: Sequence[str],
  front: Sequence[int],
  lines: Sequence[tuple[str, float]],
) -> None:
  """Writes each name where it covers nothing, if there is room."""
  halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
  texts = [
    ax.text(0, 0, name, fontsize=8.5, zorder=2.5, path_effects=halo) for name in names
  ]
  renderer = canvas.get_renderer()
  boxes = [text.get_window_extent(renderer) for text in texts]
  pixels = [tuple(p) for p in ax.transData.transform(points)]
  area = ax.get_window_extent(renderer)
  obstacles = []
  for i, j in itertools.pairwise(front):
    obstacles += labels.along(pixels[i], pixels[j])
  for _, bits in lines:
    y = ax.transData.transform((0, bits))[1]
    obstacles.append((area.x0, y - 1, area.x1, y + 1))
  corners = labels.place(
    pixels,
    [(box.width, box.height) for box in boxes],
    (area.x0, area.y0, area.x1, area.y1),
    obstacles,
    gap=13.0,
  )
  invert = figure.transFigure.inverted()
  for text, corner in zip(texts, corners, strict=True):
    text.set_transform(figure.transFigure)
    text.set_position(invert.transform(corner))
    text.set_va("bottom")
