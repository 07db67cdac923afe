"""report.html: one file with everything in it; it asks nothing of any network."""

import html
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from effjax.report import axes as axes_lib
from effjax.report import markdown, method, summary
from effjax.report import result as result_lib
from effjax.report import table as table_lib

# A curve is drawn with at most this many points.
_MAX_POINTS = 500
# Fields of a metrics row that are no curves.
_NOT_CURVES = ("step", "stage", "tokens", "wall_secs", "eval_secs")
# Curves that are offered first.
_FIRST_CURVES = ("loss", "eval_bits_per_byte", "eval_loss", "lr", "grad_norm")

Row = Mapping[str, Any]


def render(results: Sequence[result_lib.Result]) -> str:
  """The report of one or several runs as a self-contained page."""
  page = string.Template(_asset("page.html"))
  return page.substitute(
    title=html.escape(markdown.title(results)),
    subtitle=html.escape(_subtitle(results)),
    style=_asset("style.css"),
    facts="\n".join(_fact(fact) for fact in summary.facts(results)),
    table=_table(table_lib.build(results), results),
    references=_references(results),
    definitions="\n".join(
      f"  <dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>"
      for term, text in method.definitions(results)
    ),
    details=_details(results),
    data=_json(_data(results)),
    plot=_asset("plot.js"),
    script=_asset("page.js"),
  )


def _asset(name: str) -> str:
  folder = resources.files("effjax.report") / "assets"
  return (folder / name).read_text("utf-8").rstrip("\n")


def _json(value: Any) -> str:
  """JSON that no HTML parser takes for the end of its script element."""
  text = json.dumps(value, allow_nan=False, separators=(",", ":"))
  return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _subtitle(results: Sequence[result_lib.Result]) -> str:
  rows = [row for result in results for row in result.stages]
  devices = list(dict.fromkeys(row["device"] for row in rows))
  members = [run for result in results for run in result.runs or (result,)]
  seeds = list(dict.fromkeys(str(r["seed"]) for run in members for r in run.stages))
  return (
    f"{len(rows)} rows · {', '.join(method.corpora(results))} · "
    f"{', '.join(devices)} · seed {', '.join(seeds)}"
  )


def _fact(fact: summary.Fact) -> str:
  label, value, detail = map(html.escape, (fact.label, fact.value, fact.detail))
  tone = f' class="{fact.tone}"' if fact.tone else ""
  return (
    f'  <div class="fact"><span>{label}</span><b>{value}</b>'
    f"<span{tone}>{detail}</span></div>"
  )


def _table(content: table_lib.Table, results: Sequence[result_lib.Result]) -> str:
  options = [_options(result, row) for result in results for row in result.stages]
  header = "".join(
    f'<th scope="col" class="{_classes(column, i)}"'
    f' title="{html.escape(column.explain)}"><button type="button">'
    f"{_breakable(column.title)}</button></th>"
    for i, column in enumerate(content.columns)
  )
  lines = [f'<table class="results"><thead><tr>{header}</tr></thead><tbody>']
  for row, title in zip(content.rows, options, strict=True):
    cells = "".join(
      _cell(column, cell, i, title)
      for i, (column, cell) in enumerate(zip(content.columns, row, strict=True))
    )
    lines.append(f"<tr>{cells}</tr>")
  return "\n".join([*lines, "</tbody></table>"])


def _breakable(title: str) -> str:
  """A header that may break after the slash of "MFLOPs/token"."""
  text = html.escape(title)
  return text.replace("/", "/<wbr>") if len(title) > 6 else text


def _classes(column: table_lib.Column, index: int) -> str:
  names = [column.key]
  names += ["num"] if column.numeric else []
  names += ["lead"] if index == 0 else []
  return " ".join(names)


def _cell(
  column: table_lib.Column, cell: table_lib.Cell, index: int, title: str
) -> str:
  tag = 'th scope="row"' if column.key == "stage" else "td"
  value = "" if cell.value is None else f' data-value="{html.escape(str(cell.value))}"'
  hover = f' title="{html.escape(title)}"' if column.key == "technique" else ""
  notes = " ".join(
    f'data-{name}="{html.escape(note.text)}" data-{name}-tone="{note.tone}"'
    for name, note in (("parent", cell.parent), ("first", cell.first))
  )
  body = html.escape(cell.text)
  if column.key == "delta":
    # Sorting follows the comparison that is shown.
    first = cell.first.text
    value += f' data-parent-value="{"" if cell.value is None else cell.value}"'
    value += f' data-first-value="{first}"'
    body = f'<span class="delta {cell.parent.tone}" {notes}>{body}</span>'
  elif cell.parent.text or cell.first.text:
    note = html.escape(cell.parent.text)
    body += f'<small class="{cell.parent.tone}" {notes}>{note}</small>'
  elif cell.parent.tone or cell.first.tone:
    body = f'<span class="tone {cell.parent.tone}" {notes}>{body}</span>'
  end = tag.partition(" ")[0]
  return f'<{tag} class="{_classes(column, index)}"{value}{hover}>{body}</{end}>'


def _options(result: result_lib.Result, row: Row) -> str:
  """What the config says about a stage: "bits=4, group=32"."""
  options = result.options(row["stage"]).get("options") or {}
  plain = {k: v for k, v in options.items() if not isinstance(v, dict | list)}
  return ", ".join(f"{name}={value}" for name, value in plain.items())


def _references(results: Sequence[result_lib.Result]) -> str:
  lines = markdown.references(results)
  if not lines:
    return ""
  body = "\n".join(
    f'<tr><td>{html.escape(name)}</td><td class="num">{bits:.4f}</td></tr>'
    for name, bits in lines
  )
  return (
    '<section>\n<h2>Compressors on the same text</h2>\n<div class="scroll fit">'
    '<table class="small"><thead><tr><th>compressor</th><th class="num">bits/byte</th>'
    f"</tr></thead><tbody>\n{body}\n</tbody></table></div>\n</section>"
  )


def _details(results: Sequence[result_lib.Result]) -> str:
  parts = [
    f"<p>Corpus: <code>{html.escape(name)}</code></p>"
    for name in method.corpora(results)
  ]
  for result in results:
    suffix = f" of {result.name}" if len(results) > 1 else ""
    for heading, value in (
      ("Corpus facts", result.corpus),
      ("Environment", result.env),
      ("Config", result.config),
    ):
      if value:
        text = html.escape(json.dumps(value, indent=2, ensure_ascii=False))
        summary_line = html.escape(heading + suffix)
        parts.append(
          f"<details><summary>{summary_line}</summary><pre>{text}</pre></details>"
        )
  return "\n".join(parts)


def _data(results: Sequence[result_lib.Result]) -> dict[str, Any]:
  several = len(results) > 1
  rows = []
  for i, result in enumerate(results):
    for row in result.stages:
      axes = (*axes_lib.COSTS, *axes_lib.QUALITIES)
      rows.append(
        {
          "name": f"{result.name}/{row['stage']}" if several else row["stage"],
          "run": i,
          "technique": _join(row["technique"], _options(result, row)),
          "simulated": row["simulated"],
          "values": {axis.key: axis.value(row) for axis in axes},
          "notes": _notes(result, row),
        }
      )
  describe = lambda axis: {
    "key": axis.key,
    "label": axis.label,
    "higher": axis.higher_is_better,
    "offScale": axis.off_scale,
  }
  return {
    "runs": [result.name for result in results],
    "rows": rows,
    "costs": [describe(axis) for axis in axes_lib.COSTS],
    "qualities": [describe(axis) for axis in axes_lib.QUALITIES],
    "references": [
      {"name": markdown.short(name), "bits": bits}
      for name, bits in markdown.references(results)
    ],
    "curves": [curve for result in results for curve in _curves(result, several)],
  }


def _join(technique: str, options: str) -> str:
  return f"{technique} ({options})" if options else technique


def _notes(result: result_lib.Result, row: Row) -> list[str]:
  """What a tooltip adds: comparisons with the parent, and what is simulated."""
  notes = []
  if row["after"]:
    content = table_lib.build([result])
    cells = content.rows[result.stages.index(row)]
    words = {
      "delta": "bits/byte",
      "held": "held",
      "p50": "decode",
      "prefill": "prefill",
    }
    found = [
      f"{words[column.key]} {cell.parent.text}"
      for column, cell in zip(content.columns, cells, strict=True)
      if column.key in words and cell.parent.text
    ]
    if found:
      notes.append(f"after {row['after']}: {', '.join(found)}")
  if row["simulated"]:
    notes.append(f"simulated: {', '.join(row['simulated'])}")
  return notes


def _curves(result: result_lib.Result, several: bool) -> Iterator[dict[str, Any]]:
  """Curves of a run's metrics: stage, metric and points, thinned out evenly."""
  found: dict[tuple[str, str], list[tuple[int, float]]] = {}
  for row in result.metrics:
    for name, value in row.items():
      is_number = isinstance(value, int | float) and not isinstance(value, bool)
      if name not in _NOT_CURVES and is_number and "step" in row:
        found.setdefault((name, row.get("stage", "")), []).append((row["step"], value))
  order = {name: i for i, name in enumerate(_FIRST_CURVES)}
  for metric, stage in sorted(found, key=lambda k: (order.get(k[0], 99), k[0])):
    points = found[metric, stage]
    every = -(-len(points) // _MAX_POINTS)
    # The last point is the one a reader looks for.
    kept = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
    name = f"{result.name}/{stage}" if several else stage
    yield {"metric": metric, "name": name, "points": kept}
