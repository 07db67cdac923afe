"""Several runs in one table and one plot."""

import os
import pathlib
from collections.abc import Sequence

from effjax.core import errors
from effjax.report import groups, sweep
from effjax.report import result as result_lib


def read(
  folders: Sequence[str | os.PathLike], by: Sequence[str] = ()
) -> list[result_lib.Result]:
  """The results of several folders, under names that tell them apart.

  A run is called by its folder's name; where two are equal, by as much of the path as
  it takes. With a sweep's folder among them, or fields to group by, runs are put
  together in groups, each a Result of its own.

  Args:
    folders: of runs and of sweeps.
    by: config fields to group by; None named: those that a sweep varies, but seeds.

  Raises:
    InputError: no folder, the same one twice, or one without a result; a field that a
      run does not have.
  """
  if not folders:
    raise errors.InputError("no run folder given; name at least one")
  paths = [pathlib.Path(folder).resolve() for folder in folders]
  for path in paths:
    if paths.count(path) > 1:
      raise errors.InputError(f"{path} is given twice; name each run folder once")
  if not by and not any(sweep.is_sweep(path) for path in paths):
    return [
      result_lib.read(folder, name)
      for folder, name in zip(folders, _names(paths), strict=True)
    ]
  runs, fields = [], []
  for path, name in zip(paths, _names(paths), strict=True):
    if sweep.is_sweep(path):
      found, _ = sweep.read(path)
    else:
      found = [(result_lib.read(path, name), {"run": name})]
    for run, own in found:
      runs.append(run)
      # The argument of a recipe is in no config; only a sweep knows it.
      chosen = {f: own[f] if f in own else groups.value(run.config, f) for f in by}
      fields.append(chosen if by else own)
  return groups.make(runs, fields)


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
  longest = max(len(path.parts) for path in paths)
  for depth in range(1, longest + 1):
    names = ["/".join(path.parts[-depth:]) for path in paths]
    if len(set(names)) == len(names):
      break
  return names
