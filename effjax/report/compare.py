"""Several runs in one table and one plot."""

import os
import pathlib
from collections.abc import Sequence

from effjax.core import errors
from effjax.report import result as result_lib


def read(folders: Sequence[str | os.PathLike]) -> list[result_lib.Result]:
  """The results of several run folders, under names that tell them apart.

  A run is called by its folder's name; where two are equal, by as much of the path as
  it takes.

  Raises:
    InputError: no folder, the same one twice, or one without a result.
  """
  if not folders:
    raise errors.InputError("no run folder given; name at least one")
  paths = [pathlib.Path(folder).resolve() for folder in folders]
  for path in paths:
    if paths.count(path) > 1:
      raise errors.InputError(f"{path} is given twice; name each run folder once")
  return [
    result_lib.read(folder, name)
    for folder, name in zip(folders, _names(paths), strict=True)
  ]


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
  longest = max(len(path.parts) for path in paths)
  for depth in range(1, longest + 1):
    names = ["/".join(path.parts[-depth:]) for path in paths]
    if len(set(names)) == len(names):
      break
  return names
