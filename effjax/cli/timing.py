"""What a benchmark hands back, and how it is printed and drawn."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import matplotlib.figure
import matplotlib.ticker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
  """Which columns of a table make curves, on logarithmic axes.

  Attributes:
    x: column of the horizontal axis.
    ys: columns drawn against it, one panel each.
    by: column whose values are the curves.
  """

  x: str
  ys: tuple[str, ...]
  by: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Rows of a benchmark.

  Attributes:
    title: what was timed.
    rows: column to value, the same columns in each; None where there is none.
    notes: conditions a reader needs to judge the numbers.
  """

  title: str
  rows: list[dict[str, Any]]
  notes: list[str]

  def markdown(self) -> str:
    """The table, its title and its notes as Markdown."""
    columns = list(self.rows[0])
    cells = [[_show(row[column]) for column in columns] for row in self.rows]
    widths = [
      max(len(column), *(len(row[i]) for row in cells))
      for i, column in enumerate(columns)
    ]
    lines = [columns, ["-" * width for width in widths], *cells]
    table = (
      "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
      for line in lines
    )
    notes = (f"- {note}" for note in self.notes)
    return "\n".join([self.title, "", *table, "", *notes])

  def draw(self, curves: Curves, path: str | os.PathLike) -> None:
    """Draws curves into a PNG, on logarithmic axes, with a legend beside them."""
    names = list(dict.fromkeys(row[curves.by] for row in self.rows))
    figure = matplotlib.figure.Figure(
      figsize=(6.4 * len(curves.ys), 5.6), dpi=150, layout="constrained"
    )
    colors = matplotlib.colormaps["tab20"].colors
    for panel, y in enumerate(curves.ys):
      ax = figure.add_subplot(1, len(curves.ys), panel + 1)
      for i, name in enumerate(names):
        points = [
          (row[curves.x], row[y])
          for row in self.rows
          if row[curves.by] == name and row[y]
        ]
        style = "--" if i >= 10 else "-"
        ax.loglog(
          *zip(*points, strict=True),
          style,
          marker="o",
          ms=3,
          lw=1.3,
          label=name,
          color=colors[2 * i % 20 + (i >= 10)],
        )
      ticks = sorted({row[curves.x] for row in self.rows})
      ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
      ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
      ax.set_xlabel(curves.x)
      ax.set_ylabel(y)
      ax.grid(alpha=0.3)
    figure.suptitle(self.title)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, format="png", metadata={"Software": None})


def _show(value: Any) -> str:
  if value is None:
    return "–"
  if not isinstance(value, float):
    return str(value)
  return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def interleaved(
  runs: Mapping[str, Callable[[jax.Array], jax.Array]],
  x: jax.Array,
  rounds: int,
  calls: int,
) -> dict[str, float]:
  """Seconds a call, the least of several turns.

  Args:
    runs: jitted functions of x by name.
    x: what they are given.
    rounds: turns of each, one after the other in each round.
    calls: in a turn, started one after the other and waited for together.
  """
  least = dict.fromkeys(runs, float("inf"))
  for run in runs.values():
    jax.block_until_ready(run(x))
  for _ in range(rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      for _ in range(calls):
        made = run(x)
      jax.block_until_ready(made)
      least[name] = min(least[name], (time.perf_counter() - start) / calls)
  return least
