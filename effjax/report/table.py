"""The one results table: rows and columns of text, before any markup.

Every number is shown as measured; beside some of them stands what it is relative to the
stage the row started from, losses included: "1.4x slower", "1.03x larger".
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effjax.report import groups, notes
from effjax.report import result as result_lib

Row = Mapping[str, Any]
MISSING = "–"
PARENT, FIRST = "parent", "first"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One entry of the table.

  Attributes:
    text: what to show.
    value: what to sort by; None sorts last.
    parent: comparison with the stage the row started from.
    first: comparison with the stage at the root.
  """

  text: str
  value: float | str | None = None
  parent: notes.Note = notes.Note()
  first: notes.Note = notes.Note()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
  """A column: its title, what it says, and how many columns drop before it does.

  Attributes:
    key: name in markup.
    title: header.
    explain: one sentence.
    numeric: aligned to the right.
    priority: on a narrow terminal columns of the highest number go first.
  """

  key: str
  title: str
  explain: str
  numeric: bool = True
  priority: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Columns, and for each row one cell a column."""

  columns: tuple[Column, ...]
  rows: tuple[tuple[Cell, ...], ...]

  def without(self, keys: Sequence[str]) -> "Table":
    """The table without some columns."""
    kept = [i for i, column in enumerate(self.columns) if column.key not in keys]
    return Table(
      columns=tuple(self.columns[i] for i in kept),
      rows=tuple(tuple(row[i] for i in kept) for row in self.rows),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
  """How a column's cells are made."""

  column: Column
  value: Callable[[Row], Any]
  show: Callable[[Any], str]
  compare: Callable[[float, float], notes.Note] | None = None


def build(results: Sequence[result_lib.Result]) -> Table:
  """The table of one or several runs; columns that say nothing are left out."""
  fields = tuple(dict.fromkeys(field for result in results for field in result.fields))
  if any(result.runs for result in results):
    specs = (*(_swept(field, fields) for field in fields), _RUNS, *_SPECS[1:])
  else:
    specs = _SPECS if len(results) > 1 else _SPECS[1:]
  rows = []
  for result in results:
    for row in result.stages:
      row = {**row, "run": result.name, "runs": len(result.runs)}
      row |= {f"field {field}": value for field, value in result.fields.items()}
      rows.append(tuple(_cell(spec, row, result) for spec in specs))
  table = Table(columns=tuple(spec.column for spec in specs), rows=tuple(rows))
  silent = [
    column.key
    for i, column in enumerate(table.columns)
    if all(row[i].text == MISSING for row in rows)
  ]
  return table.without(silent)


def _cell(spec: _Spec, row: Row, result: result_lib.Result) -> Cell:
  value = spec.value(row)
  if value is None:
    quality, key = row["quality"], spec.column.key
    counted = {"bpb": "num_bytes", "ppl": "num_tokens"}.get(key)
    broken = quality.get(counted) or (key == "accuracy" and key in quality)
    return Cell(text="not finite" if broken else MISSING)
  compared = {}
  if spec.compare is not None:
    for name, other in (
      (PARENT, result.parent(row)),
      (FIRST, result.first(row)),
    ):
      base = None if other is None else spec.value(other)
      compared[name] = notes.Note() if base is None else spec.compare(value, base)
  if spec.column.key == "delta":
    # The difference itself is the cell.
    parent = result.parent(row)
    base = None if parent is None else spec.value(parent)
    value = None if base is None else value - base
    return Cell(text=compared[PARENT].text or MISSING, value=value, **compared)
  if spec.column.key == "technique" and row["after"]:
    after = notes.Note(text=f"after {row['after']}")
    compared = {PARENT: after, FIRST: after}
  text = spec.show(value) + _spread(spec, row, result)
  return Cell(text=text, value=value, **compared)


def _spread(spec: _Spec, row: Row, result: result_lib.Result) -> str:
  """Standard deviation over the runs of a group, where they differ."""
  numeric = spec.column.numeric and spec is not _RUNS
  deviation = groups.deviation(result, row["stage"], spec.value) if numeric else None
  return f" ± {spec.show(deviation)}" if deviation else ""


def _digits(value: float) -> str:
  """Three or four significant digits, never an exponent."""
  for limit, digits in ((1, 3), (10, 2), (100, 1)):
    if abs(value) < limit:
      return f"{value:.{digits}f}"
  return f"{value:,.0f}"


def _field(name: str, scale: float = 1.0) -> Callable[[Row], Any]:
  return lambda row: None if row[name] is None else float(row[name]) * scale


def _word(name: str) -> Callable[[Row], str]:
  return lambda row: row[name]


def _quality(name: str) -> Callable[[Row], Any]:
  def value(row: Row) -> float | None:
    found = row["quality"].get(name)
    return None if found is None else float(found)

  return value


def _spec(
  key: str,
  title: str,
  explain: str,
  value: Callable[[Row], Any],
  show: Callable[[Any], str] = _digits,
  compare: Callable[[float, float], notes.Note] | None = None,
  *,
  numeric: bool = True,
  priority: int = 1,
) -> _Spec:
  column = Column(
    key=key, title=title, explain=explain, numeric=numeric, priority=priority
  )
  return _Spec(column=column, value=value, show=show, compare=compare)


def _swept(field: str, fields: Sequence[str]) -> _Spec:
  """The column of a field that a sweep varies: its last word, where that is enough."""
  last = field.rsplit(".", 1)[-1]
  words = [other.rsplit(".", 1)[-1] for other in fields]
  return _spec(
    f"field-{fields.index(field)}",
    last if words.count(last) == 1 else field,
    f"Config field {field}.",
    lambda row: row.get(f"field {field}"),
    str,
    numeric=False,
    priority=0,
  )


_RUNS = _spec(
  "runs",
  "runs",
  "Runs of the group, which differ in the seed only.",
  lambda row: float(row["runs"]),
  lambda v: f"{v:.0f}",
  priority=1,
)
_SPECS = (
  _spec("run", "run", "Run folder.", _word("run"), str, numeric=False, priority=0),
  _spec(
    "stage",
    "stage",
    "Stage of the recipe.",
    _word("stage"),
    str,
    numeric=False,
    priority=0,
  ),
  _spec(
    "technique",
    "technique",
    "What the stage did, and to which earlier stage.",
    _word("technique"),
    str,
    numeric=False,
    priority=4,
  ),
  _spec(
    "bpb",
    "bits/byte",
    "Bits per byte of the validation text; lower is better.",
    _quality("bits_per_byte"),
    lambda v: f"{v:.4f}",
    priority=0,
  ),
  _spec(
    "delta",
    "Δ bits/byte",
    "Difference in bits per byte; positive is worse.",
    _quality("bits_per_byte"),
    str,
    notes.difference,
  ),
  _spec("ppl", "ppl", "Perplexity per token.", _quality("perplexity"), priority=5),
  _spec(
    "accuracy",
    "accuracy",
    "Share of right answers.",
    _quality("accuracy"),
    lambda v: f"{100 * v:.2f} %",
    notes.points,
    priority=0,
  ),
  _spec(
    "bits",
    "bits/weight",
    "Bits held per weight before compression: scales, zero points and masks count.",
    _field("bits_per_weight"),
    lambda v: f"{v:.2f}",
    priority=0,
  ),
  _spec(
    "nonzero",
    "nonzero",
    "Share of weights that are not exactly zero.",
    lambda row: row["num_nonzero"] / row["num_params"],
    lambda v: f"{100 * v:.1f} %",
    priority=6,
  ),
  _spec(
    "held",
    "MB held",
    "Bytes of all parameter arrays in memory, in 10^6.",
    _field("bytes_held", 1e-6),
    compare=notes.size,
    priority=2,
  ),
  _spec(
    "disk",
    "MB disk",
    "Bytes of the packed safetensors file, uncompressed, in 10^6.",
    _field("bytes_on_disk", 1e-6),
    priority=5,
  ),
  _spec(
    "theoretical",
    "MFLOPs/token theor.",
    "What remains if multiplications by pruned weights were skipped.",
    _field("flops_per_token", 1e-6),
    compare=notes.work,
    priority=5,
  ),
  _spec(
    "executed",
    "MFLOPs/token exec.",
    "What really runs.",
    _field("flops_executed_per_token", 1e-6),
    compare=notes.work,
    priority=5,
  ),
  _spec(
    "prefill",
    "prefill ms",
    "Median time to read the prompt.",
    _field("prefill_ms"),
    compare=notes.time,
    priority=4,
  ),
  _spec(
    "p50",
    "decode ms p50",
    "Median time of one decoded token.",
    _field("decode_ms_p50"),
    compare=notes.time,
  ),
  _spec(
    "p90",
    "decode ms p90",
    "90th percentile of the time of one decoded token.",
    _field("decode_ms_p90"),
    priority=5,
  ),
  _spec(
    "rate",
    "tok/s",
    "Decoded tokens a second.",
    _field("tokens_per_sec"),
    compare=notes.rate,
    priority=3,
  ),
  _spec(
    "peak",
    "peak MB",
    "Peak memory of the stage, in 10^6 bytes.",
    _field("peak_memory_bytes", 1e-6),
    priority=6,
  ),
  _spec(
    "secs",
    "stage s",
    "Seconds the stage took.",
    _field("stage_secs"),
    priority=3,
  ),
  _spec(
    "simulated",
    "simulated",
    "What is promised but not really saved here.",
    lambda row: ", ".join(row["simulated"]) or None,
    str,
    numeric=False,
    priority=2,
  ),
)
