"""Writes the reports of one run into its folder, or of several into another.

A file is written beside its place and renamed, so it is whole or absent.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effjax.report import html, markdown, plots
from effjax.report import result as result_lib

PLOT = "pareto.png"


def write(
  folder: str | os.PathLike,
  stages: Sequence[Mapping[str, Any]],
  references: Sequence[Mapping[str, Any]] = (),
  corpus: Mapping[str, Any] | None = None,
) -> result_lib.Result:
  """Writes `report.md`, `report.html`, `pareto.png` and, last, `result.json`.

  Args:
    folder: the run folder; its config.json, env.json and metrics.jsonl are read.
    stages: rows of the table.
    references: lines of compressors, from measure.baselines.
    corpus: facts about the corpus.

  Raises:
    InputError: a row does not fit the schema.
  """
  folder = pathlib.Path(folder)
  data = {
    "stages": list(stages),
    "references": list(references),
    "corpus": dict(corpus or {}),
  }
  result = result_lib.make(folder, data)
  render([result], folder)
  text = json.dumps(data, indent=2, allow_nan=False) + "\n"
  with _replacing(folder / result_lib.FILE) as partial:
    partial.write_text(text, "utf-8")
  return result


def render(
  results: Sequence[result_lib.Result], folder: str | os.PathLike
) -> list[pathlib.Path]:
  """Writes `report.md`, `report.html` and `pareto.png` of finished runs.

  Returns:
    The files written; without any scored row there is no plot.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  written = []
  with _replacing(folder / PLOT) as partial:
    has_plot = plots.save_pareto(partial, results)
  if has_plot:
    written.append(folder / PLOT)
  for name, text in (
    ("report.md", markdown.render(results, PLOT if has_plot else None)),
    ("report.html", html.render(results)),
  ):
    with _replacing(folder / name) as partial:
      partial.write_text(text, "utf-8")
    written.append(folder / name)
  return written


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path to write to, which takes the place of `path` once it is on disk."""
  partial = path.with_name(f".{path.name}.partial")
  try:
    yield partial
    if partial.exists():
      with partial.open("rb") as file:
        os.fsync(file.fileno())
      partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
