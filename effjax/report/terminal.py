"""The table on a terminal, and as plain aligned text where the output is a file."""

import shutil
import sys
from typing import Any

from rich import box, text
from rich import console as rich_console
from rich import table as rich_table

from effjax.report import markdown
from effjax.report import table as table_lib

_STYLES = {"better": "green", "worse": "red", "": ""}


def show(content: table_lib.Table, file: Any = None) -> None:
  """Prints a table.

  On a terminal the columns that matter least are left out until the rest fits, and a
  line says which. Elsewhere every column is printed, in plain text.

  Args:
    content: the table.
    file: open text file; standard output if None.
  """
  file = sys.stdout if file is None else file
  if not file.isatty():
    file.write(plain(content))
    return
  width = shutil.get_terminal_size().columns
  shown = fit(content, width)
  console = rich_console.Console(file=file, width=width)
  console.print(_rich(shown))
  missing = [c.title for c in content.columns if c not in shown.columns]
  if missing:
    console.print(
      f"not shown for lack of width: {', '.join(missing)}", style="dim", highlight=False
    )


def plain(content: table_lib.Table) -> str:
  """Columns aligned by spaces, without colour; two spaces part them."""
  lines = [[column.title for column in content.columns], *_texts(content)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(content.columns))]
  aligned = [
    "  ".join(
      cell.rjust(width) if column.numeric else cell.ljust(width)
      for cell, width, column in zip(line, widths, content.columns, strict=True)
    ).rstrip()
    for line in lines
  ]
  return "\n".join(aligned) + "\n"


def fit(content: table_lib.Table, width: int) -> table_lib.Table:
  """Drops columns, the highest priority number first, until the table fits."""
  while _width(content) > width:
    droppable = [c for c in content.columns if c.priority > 0]
    if not droppable:
      break
    worst = max(c.priority for c in droppable)
    last = [c for c in droppable if c.priority == worst][-1]
    content = content.without([last.key])
  return content


def _texts(content: table_lib.Table) -> list[list[str]]:
  return [
    [markdown.text(c, cell) for c, cell in zip(content.columns, row, strict=True)]
    for row in content.rows
  ]


def _width(content: table_lib.Table) -> int:
  """Columns of characters the rich table takes: two of padding for each."""
  lines = [[column.title for column in content.columns], *_texts(content)]
  return sum(max(len(line[i]) for line in lines) + 2 for i in range(len(lines[0])))


def _rich(content: table_lib.Table) -> rich_table.Table:
  found = rich_table.Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
  for column in content.columns:
    found.add_column(
      column.title, justify="right" if column.numeric else "left", no_wrap=True
    )
  for row, texts in zip(content.rows, _texts(content), strict=True):
    found.add_row(
      *(
        text.Text(shown, style=_STYLES[cell.parent.tone])
        for cell, shown in zip(row, texts, strict=True)
      )
    )
  return found
