"""The run folder: what belongs to it, whose it is, and how files get into it.

`config.json overrides.txt env.json metrics.jsonl tb/ checkpoints/ stages/<n>-<name>/
report.md report.html pareto.png result.json`. A file is complete or absent: each is
written beside its place and renamed. `result.json` comes last. Of several processes
process 0 writes, and the others read: the folder is on a file system that all share.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from effjax.core import config as config_lib
from effjax.core import errors
from effjax.parallel import hosts

CONFIG = "config.json"
RESULT = "result.json"
# In a stage folder: its row of the results table.
ROW = "row.json"
_LOCK = ".lock"
# Everything a run writes; --fresh removes these and nothing else.
_OWNED = (
  CONFIG,
  "overrides.txt",
  "env.json",
  "metrics.jsonl",
  "tb",
  "checkpoints",
  "stages",
  "profile",
  "report.md",
  "report.html",
  "pareto.png",
  RESULT,
)
_MAX_SHOWN = 5


def check(root: pathlib.Path, config: Any, fresh: bool) -> None:
  """Whether a run of `config` may use `root`; writes nothing.

  Args:
    root: the run folder, which may not exist yet.
    config: plain config (see core.config.to_dict).
    fresh: whether an earlier run in it is to be deleted.

  Raises:
    InputError: it is a file, holds something else than a run, or holds a run of
      another config (`mesh` aside: a run may go on with other devices); the message
      lists what differs.
  """
  if not root.exists():
    return
  if not root.is_dir():
    raise errors.InputError(f"{root} is a file, not a run folder; choose --workdir")
  if not (root / CONFIG).is_file():
    others = [p.name for p in sorted(root.iterdir()) if not p.name.startswith(".")]
    if others:
      raise errors.InputError(
        f"{root} is not a run folder (no {CONFIG}) and holds {', '.join(others[:3])}; "
        "choose another --workdir"
      )
    return
  if fresh:
    return
  found = config_lib.differences(*map(_computed, (read_json(root / CONFIG), config)))
  if found:
    more = len(found) - _MAX_SHOWN
    shown = "; ".join(found[:_MAX_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    raise errors.InputError(
      f"{root} is a run of another config: {shown}; choose another --workdir, or "
      "--fresh to delete that run and start over"
    )


@contextlib.contextmanager
def opened(
  root: pathlib.Path, config: Any, overrides: Sequence[str], fresh: bool = False
) -> Iterator[None]:
  """Holds the folder for this run, with `config.json` and `overrides.txt` in it.

  The lock falls with process 0, however it ends.

  Raises:
    InputError: see `check`; or another run is under way in the folder; or a process
      does not see what process 0 wrote.
  """
  with contextlib.ExitStack() as held:
    hold = _held(root, config, overrides, fresh)
    hosts.told("open the run folder", lambda: held.enter_context(hold))
    hosts.see(root / CONFIG)
    yield


@contextlib.contextmanager
def _held(
  root: pathlib.Path, config: Any, overrides: Sequence[str], fresh: bool
) -> Iterator[None]:
  check(root, config, fresh)
  root.mkdir(parents=True, exist_ok=True)
  with open(root / _LOCK, "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.InputError(
        f"another process is running in {root}; wait for it or choose another --workdir"
      ) from None
    if fresh:
      _clear(root)
    if not (root / CONFIG).exists() or read_json(root / CONFIG) != config:
      write_text(root / "overrides.txt", "".join(f"{o}\n" for o in overrides))
      write_json(root / CONFIG, config)
    yield


def busy(root: pathlib.Path) -> bool:
  """Whether a process is running in the folder."""
  path = root / _LOCK
  if not path.exists():
    return False
  with open(path) as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False


def stage_folder(root: pathlib.Path, index: int, name: str) -> pathlib.Path:
  """`stages/<n>-<name>`, n from 1."""
  return root / "stages" / f"{index + 1}-{name}"


def read_json(path: pathlib.Path) -> Any:
  """The content of a JSON file.

  Raises:
    InputError: missing or not JSON.
  """
  try:
    return json.loads(path.read_text("utf-8"))
  except FileNotFoundError:
    raise errors.InputError(f"{path} does not exist") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise errors.InputError(f"{path} is damaged: {error}") from None


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON, atomically; NaN and infinities are refused with ValueError."""
  write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file, atomically: on disk before it takes its name."""
  beside = path.with_name(f".{path.name}.tmp")
  with open(beside, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  beside.replace(path)


def _computed(config: Any) -> Any:
  """A plain config without what may change from start to start: the devices used."""
  return {name: value for name, value in config.items() if name != "mesh"}


def _clear(root: pathlib.Path) -> None:
  for path in root.glob("diverged-*.json"):
    path.unlink()
  # config.json goes last: without it, a half-deleted run is no run folder any more.
  for name in sorted(_OWNED, key=lambda name: name == CONFIG):
    path = root / name
    if path.is_symlink() or path.is_file():
      path.unlink()
    elif path.is_dir():
      shutil.rmtree(path)
