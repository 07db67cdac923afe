"""What files a folder of arrays must hold, so that damage is found before it is read.

The array store finds damage too, but only while many reads are under way, and reports
it in pages rather than in a line.
"""

import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

# Of larger files only the beginning is summed: reading a checkpoint twice costs time.
SUMMED_BYTES = 1 << 26


def take(folder: pathlib.Path) -> dict[str, list[int]]:
  """Size in bytes and CRC-32 of every file below `folder`, by relative path."""
  files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
  return {str(path.relative_to(folder)): _fingerprint(path) for path in files}


def check(folder: pathlib.Path, inventory: Mapping[str, Any]) -> None:
  """Compares a folder with its inventory; files that were added do not matter.

  Raises:
    ValueError: a file is missing, cut or changed; the message names it in one line.
  """
  for name, expected in inventory.items():
    path = folder / name
    if not path.is_file():
      raise ValueError(f"{name} is missing")
    found = _fingerprint(path)
    if found[0] != expected[0]:
      raise ValueError(f"{name} has {found[0]} of {expected[0]} bytes")
    if found != expected:
      raise ValueError(f"the content of {name} was changed")


def _fingerprint(path: pathlib.Path) -> list[int]:
  with path.open("rb") as file:
    checksum = zlib.crc32(file.read(SUMMED_BYTES))
  return [path.stat().st_size, checksum]
