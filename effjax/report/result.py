"""What a run folder tells a report: `result.json` and what stands beside it."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from effjax.core import errors

FILE = "result.json"

_NUMBER = (int, float)
_OPTIONAL = (int, float, type(None))
# Every field of a row and the types it may have.
FIELDS: dict[str, tuple[type, ...]] = {
  "stage": (str,),
  "technique": (str,),
  "after": (str, type(None)),
  "quality": (dict,),
  "num_params": (int,),
  "num_nonzero": (int,),
  "bits_per_weight": _NUMBER,
  "bytes_held": (int,),
  "bytes_on_disk": (int,),
  "flops_per_token": _OPTIONAL,
  "flops_executed_per_token": _OPTIONAL,
  "prefill_ms": _OPTIONAL,
  "decode_ms_p50": _OPTIONAL,
  "decode_ms_p90": _OPTIONAL,
  "tokens_per_sec": _OPTIONAL,
  "peak_memory_bytes": (int, type(None)),
  "stage_secs": _OPTIONAL,
  "simulated": (list,),
  "batch": (int,),
  "prompt_tokens": (int,),
  "decode_tokens": (int,),
  "device": (str,),
  "seed": (int,),
  "corpus": (str,),
}
_TEXT_QUALITY = ("loss", "perplexity", "bits_per_byte", "num_tokens", "num_bytes")
_SIMULATED = ("bytes", "flops")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """A finished run.

  Attributes:
    name: what to call it, the folder's name.
    stages: rows, in the order of the recipe (see FIELDS).
    references: `{"name", "bits_per_byte"}` of compressors on the same text.
    corpus: facts about the corpus, or empty.
    config: the resolved config, or empty.
    env: versions and machine, or empty.
    metrics: rows of `metrics.jsonl`, or empty.
    fields: of a group of runs, what they have in common: config field to value.
    runs: of a group, the runs; everything else above is then of the first one, but the
      numbers of `stages`, which are means.
  """

  name: str
  stages: tuple[Mapping[str, Any], ...]
  references: tuple[Mapping[str, Any], ...] = ()
  corpus: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  env: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  metrics: tuple[Mapping[str, Any], ...] = ()
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  runs: tuple["Result", ...] = ()

  def row(self, stage: str | None) -> Mapping[str, Any] | None:
    """The row of a stage, None if there is none."""
    return next((row for row in self.stages if row["stage"] == stage), None)

  def parent(self, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of the stage that `row` started from, None for a first stage."""
    return self.row(row["after"])

  def first(self, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The stage at the root of what `row` was made from, None for a root itself."""
    at, seen = row, {row["stage"]}
    while (before := self.parent(at)) is not None and before["stage"] not in seen:
      at = before
      seen.add(at["stage"])
    return None if at is row else at

  def options(self, stage: str) -> Mapping[str, Any]:
    """What the config says about a stage, or empty."""
    stages = self.config.get("stages") or ()
    return next((s for s in stages if s.get("name") == stage), {})


def make(folder: str | os.PathLike, data: Any, name: str | None = None) -> Result:
  """A result from the content of result.json and the other files of the folder.

  Args:
    folder: the run folder; `config.json`, `env.json` and `metrics.jsonl` may be absent.
    data: `{"stages": rows, "references": lines, "corpus": facts}`.
    name: what to call the run; the folder's name if None.

  Raises:
    InputError: a row is not one (the first wrong field is named), or a file is damaged.
  """
  folder = pathlib.Path(folder)
  _check(data, folder / FILE)
  return Result(
    name=name or folder.resolve().name,
    stages=tuple(data["stages"]),
    references=tuple(data.get("references") or ()),
    corpus=data.get("corpus") or {},
    config=_optional_json(folder / "config.json"),
    env=_optional_json(folder / "env.json"),
    metrics=tuple(read_metrics(folder / "metrics.jsonl")),
  )


def read(folder: str | os.PathLike, name: str | None = None) -> Result:
  """The result of a finished run.

  Raises:
    InputError: no such folder, no result in it, or one that does not fit the schema.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise errors.InputError(f"{folder} is not a folder; give the folder of a run")
  path = folder / FILE
  if not path.exists():
    raise errors.InputError(
      f"{folder} holds no {FILE}: the run has not finished; run it again to resume it, "
      "or give the folder of a finished run"
    )
  return make(folder, _json(path), name)


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Rows of a metrics file; a torn last line is left out, a missing file is empty."""
  if not path.exists():
    return []
  rows = []
  for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
    try:
      rows.append(json.loads(line))
    except ValueError:
      raise errors.InputError(f"{path}: line {number} is not JSON") from None
  return rows


def _check(data: Any, path: pathlib.Path) -> None:
  if not isinstance(data, Mapping) or not isinstance(data.get("stages"), list | tuple):
    raise errors.InputError(f'{path} has no list "stages"; is it a result of effjax?')
  if not data["stages"]:
    raise errors.InputError(f"{path} holds no stage")
  for i, row in enumerate(data["stages"]):
    problem = _row_problem(row)
    if problem:
      raise errors.InputError(f"{path}: stages[{i}] {problem}")
  for i, line in enumerate(data.get("references") or ()):
    if not isinstance(line, Mapping) or not {"name", "bits_per_byte"} <= line.keys():
      raise errors.InputError(
        f'{path}: references[{i}] needs "name" and "bits_per_byte"'
      )


def _row_problem(row: Any) -> str | None:
  if not isinstance(row, Mapping):
    return "is not an object"
  for name, types in FIELDS.items():
    if name not in row:
      return f"has no field {name!r}"
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, types):
      allowed = " or ".join("null" if t is type(None) else t.__name__ for t in types)
      return f"field {name!r} must be {allowed}, got {value!r}"
    if isinstance(value, float) and not math.isfinite(value):
      return f"field {name!r} must be finite or null, got {value!r}"
  if not set(row["simulated"]) <= set(_SIMULATED):
    return f"field 'simulated' may hold {' and '.join(_SIMULATED)} only"
  missing = [name for name in _TEXT_QUALITY if name not in row["quality"]]
  if missing and "accuracy" not in row["quality"]:
    return f"field 'quality' has neither 'accuracy' nor {missing[0]!r}"
  return None


def _json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text("utf-8"))
  except ValueError as error:
    raise errors.InputError(f"{path} is damaged: {error}") from None


def _optional_json(path: pathlib.Path) -> Any:
  return _json(path) if path.exists() else {}
