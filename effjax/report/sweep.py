"""What a sweep's folder holds: `sweep.json`, and a run folder for each trial."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core import errors
from effjax.report import result as result_lib

FILE = "sweep.json"
_OWNED = (FILE, "sweep.db", "sweep.db-journal", "trials", "logs")
_REPORTS = ("report.md", "report.html", "pareto.png")


def is_sweep(folder: pathlib.Path) -> bool:
  """Whether a folder is one of a sweep."""
  return (folder / FILE).is_file()


def trial_folder(root: pathlib.Path, number: int) -> pathlib.Path:
  """The run folder of a trial."""
  return root / "trials" / f"{number:04d}"


def check_free(root: pathlib.Path) -> None:
  """Whether a sweep may use a folder.

  Raises:
    InputError: it is a file, or holds something else.
  """
  if root.exists() and not root.is_dir():
    raise errors.InputError(f"{root} is a file, not a folder; choose --workdir")
  if not root.exists():
    return
  own = (*_OWNED, *_REPORTS)
  others = [
    path.name
    for path in sorted(root.iterdir())
    if not path.name.startswith(".") and path.name not in own
  ]
  if others and not is_sweep(root):
    raise errors.InputError(
      f"{root} is not the folder of a sweep (no {FILE}) and holds "
      f"{', '.join(others[:3])}; choose another --workdir"
    )


def write(
  root: pathlib.Path,
  about: Mapping[str, Any],
  seed_fields: Sequence[str],
  trials: Mapping[int, Mapping[str, str]],
) -> None:
  """Writes `sweep.json`, atomically.

  Args:
    root: the sweep's folder.
    about: what all trials share.
    seed_fields: fields that are averaged over.
    trials: number to the values of the swept fields.
  """
  content = dict(about) | {
    "seed_fields": list(seed_fields),
    "trials": [{"number": n, "point": dict(point)} for n, point in trials.items()],
  }
  beside = root / f".{FILE}.{os.getpid()}"  # Workers may write at the same time.
  beside.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
  beside.replace(root / FILE)


def read(
  root: pathlib.Path,
) -> tuple[list[tuple[result_lib.Result, dict[str, str]]], int]:
  """The finished runs of a sweep with what to group each by, and how many are missing.

  Raises:
    InputError: not a sweep's folder, or no trial is finished.
  """
  try:
    content = json.loads((root / FILE).read_text("utf-8"))
  except (OSError, ValueError) as error:
    raise errors.InputError(f"{root / FILE} cannot be read: {error}") from None
  found, missing = [], 0
  for trial in content["trials"]:
    folder = trial_folder(root, trial["number"])
    if not (folder / result_lib.FILE).exists():
      missing += 1
      continue
    fields = {
      field: value
      for field, value in trial["point"].items()
      if field not in content["seed_fields"]
    }
    found.append((result_lib.read(folder), fields))
  if not found:
    raise errors.InputError(f"no trial of {root} is finished yet")
  return found, missing
