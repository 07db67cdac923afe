"""Where metrics go: one JSON object a line always, and TensorBoard events.

A line is written whole and flushed; a process killed in between leaves at most one torn
last line, which the next start removes together with every row past the step it resumes
from, so that no step ever stands in the file twice.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2, summary_pb2

# Fields that differ between two runs that are otherwise equal.
TIMED = ("tokens_per_sec", "mfu", "memory_bytes", "wall_secs", "eval_secs")

Row = Mapping[str, Any]


class JsonlWriter:
  """Appends rows to `metrics.jsonl`."""

  def __init__(self, path: pathlib.Path, stage: str, step: int):
    """Opens the file, cut back to what this start continues.

    Args:
      path: file, made if missing.
      stage: the stage whose rows past `step` are dropped.
      step: updates the restored state has done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_back(path, stage, step)
    # Unbuffered: a row that does not fit on the disk is reported once, by its write.
    self._file = path.open("ab", buffering=0)

  def write(self, row: Row) -> None:
    """Writes one row; numbers that are not finite become strings."""
    rest = (json.dumps(_plain(row), allow_nan=False) + "\n").encode()
    while rest:
      rest = rest[self._file.write(rest) :]

  def sync(self) -> None:
    """Makes sure that what was written outlives a power cut."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class TensorBoardWriter:
  """Writes the numbers of each row as scalars, by step.

  A row is one event, written at once: the queues and threads of tensorboardX's own
  writer take longer than a small train step, and lose the error of a full disk.
  """

  def __init__(self, directory: pathlib.Path, step: int):
    """Opens a new file of events.

    Args:
      directory: shown by TensorBoard as one run.
      step: updates the restored state has done; later events of earlier files count no
        more.
    """
    directory.mkdir(parents=True, exist_ok=True)
    self._writer = event_file_writer.EventsWriter(
      str(directory / "events"), f".{os.getpid()}.{step}"
    )
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(step=step + 1, session_log=start)

  def write(self, row: Row) -> None:
    """Writes the numbers of a row."""
    scalars = [
      summary_pb2.Summary.Value(tag=name, simple_value=value)
      for name, value in row.items()
      if name != "step" and isinstance(value, int | float)
    ]
    self._add(step=row["step"], summary=summary_pb2.Summary(value=scalars))

  def sync(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()

  def _add(self, **fields: Any) -> None:
    self._writer.write_event(event_pb2.Event(wall_time=time.time(), **fields))
    self._writer.flush()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """All whole rows of a metrics file; a torn last line is left out."""
  if not path.exists():
    return []
  lines = path.read_bytes().split(b"\n")
  return [json.loads(line) for line in lines[:-1] if line]


def cut_back(path: pathlib.Path, stage: str, step: int) -> None:
  """Drops a stage's rows past `step` and a torn last line, atomically."""
  if not path.exists():
    return
  kept = [r for r in read(path) if r.get("stage") != stage or r["step"] <= step]
  text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
  if text.encode() == path.read_bytes():
    return
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


def write_report(path: pathlib.Path, report: Mapping[str, Any]) -> None:
  """Writes a small JSON report, atomically."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(_plain(report), indent=2) + "\n", encoding="utf-8")
  os.replace(partial, path)


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {name: _plain(item) for name, item in value.items()}
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value
