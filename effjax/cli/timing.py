"""What a benchmark hands back, and how it is printed."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Rows of a benchmark.

  Attributes:
    title: what was timed.
    rows: column to value, the same columns in each.
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


def _show(value: Any) -> str:
  if not isinstance(value, float):
    return str(value)
  return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
