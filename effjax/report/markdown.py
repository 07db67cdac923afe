"""report.md: the table, the headline facts and how each number was measured."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.report import method, summary
from effjax.report import result as result_lib
from effjax.report import table as table_lib

# A title names at most this many runs.
_MAX_NAMES = 4


def render(results: Sequence[result_lib.Result], plot: str | None = None) -> str:
  """The report of one or several runs as Markdown.

  Args:
    results: the runs.
    plot: relative path of the Pareto plot, if there is one.
  """
  parts = [f"# {title(results)}"]
  parts.append(
    "\n".join(
      f"- **{fact.label}**: {_escape(fact.value)} ({_escape(fact.detail)})"
      for fact in summary.facts(results)
    )
  )
  parts.append(table(table_lib.build(results)))
  lines = references(results)
  if lines:
    parts.append("## Compressors on the same text")
    body = [f"| {_escape(name)} | {bits:.4f} |" for name, bits in lines]
    parts.append("\n".join(["| compressor | bits/byte |", "|---|---:|", *body]))
  if plot:
    parts.append(f"![Trade-off of size and quality]({plot})")
  parts.append("## How each number was measured")
  parts.append(
    "\n".join(f"- **{term}**: {text}" for term, text in method.definitions(results))
  )
  parts.append("## Corpus")
  parts.append("\n".join(f"- {_escape(name)}" for name in method.corpora(results)))
  for result in results:
    suffix = f" of {_escape(result.name)}" if len(results) > 1 else ""
    for heading, value in (("Environment", result.env), ("Config", result.config)):
      if value:
        parts += [f"## {heading}{suffix}", _code(value)]
  return "\n\n".join(part for part in parts if part) + "\n"


def table(content: table_lib.Table) -> str:
  """A Markdown table; comparisons stand in parentheses behind the number."""
  header = [column.title for column in content.columns]
  rule = ["---:" if column.numeric else "---" for column in content.columns]
  body = [
    [
      _escape(text(column, cell))
      for column, cell in zip(content.columns, row, strict=True)
    ]
    for row in content.rows
  ]
  return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))


def text(column: table_lib.Column, cell: table_lib.Cell) -> str:
  """A cell with its comparison, as plain text."""
  note = cell.parent.text
  if not note or column.key == "delta":
    return cell.text
  return f"{cell.text} ({note})"


def title(results: Sequence[result_lib.Result]) -> str:
  """What the report calls itself."""
  names = [result.name for result in results]
  if len(names) > _MAX_NAMES:
    names = [*names[: _MAX_NAMES - 1], f"{len(names) - _MAX_NAMES + 1} more"]
  listed = f"{', '.join(names[:-1])} and {names[-1]}" if names[1:] else names[0]
  return f"{listed}: what each way cost"


def references(results: Sequence[result_lib.Result]) -> list[tuple[str, float]]:
  """Reference lines of all runs, each once; runs with other text name themselves."""
  lines: dict[tuple[str, float], str] = {}
  for result in results:
    for line in result.references:
      lines.setdefault((line["name"], line["bits_per_byte"]), result.name)
  names = [name for name, _ in lines]
  return [
    (f"{name} ({run})" if names.count(name) > 1 else name, bits)
    for (name, bits), run in lines.items()
  ]


def short(name: str) -> str:
  """The name of a reference line, short enough for a margin."""
  head, _, tail = name.partition(", primed with the training text")
  return f"{head} primed{tail}" if head != name else name


def _code(value: Mapping[str, Any]) -> str:
  return f"```json\n{json.dumps(value, indent=2)}\n```"


def _escape(value: str) -> str:
  return value.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
