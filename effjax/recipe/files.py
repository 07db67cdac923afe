"""Config files: Python with `get_config(arg="")`, executed to get a ConfigDict.

A config file is code and runs with your rights: run only files you trust.
"""

import importlib.util
import inspect
import pathlib
import sys
from types import ModuleType
from typing import Any

import ml_collections

from effjax.core import errors


def split(reference: str) -> tuple[pathlib.Path, str]:
  """`"configs/quickstart.py:smoke"` as the file and the argument ("" if none).

  Raises:
    InputError: there is no such file; the message names the nearest one.
  """
  path, arg = pathlib.Path(reference), ""
  if not path.exists() and ":" in reference:
    name, _, arg = reference.rpartition(":")
    path = pathlib.Path(name)
  if path.is_file():
    return path, arg
  siblings = [str(p) for p in sorted(path.parent.glob("*.py"))]
  match = errors.nearest(str(path), siblings)
  hint = f"did you mean {match!r}?" if match else "see: effjax list configs"
  raise errors.InputError(f"config file {str(path)!r} does not exist; {hint}")


def read(reference: str) -> dict[str, Any]:
  """Runs `get_config(arg)` of `FILE[:arg]`; returns plain dicts, tuples and scalars.

  Raises:
    InputError: no such file, not Python, no `get_config`, or not a ConfigDict. What
      `get_config` raises about its argument passes through.
  """
  path, arg = split(reference)
  module = _execute(path)
  get_config = getattr(module, "get_config", None)
  if get_config is None:
    raise errors.InputError(
      f"{path} defines no get_config(arg=''), which returns an "
      "ml_collections.ConfigDict"
    )
  if arg and not inspect.signature(get_config).parameters:
    raise errors.InputError(f"{path} takes no argument, got {arg!r}")
  config = get_config(arg) if arg else get_config()
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.InputError(
      f"get_config of {path} must return an ml_collections.ConfigDict, "
      f"not {type(config).__name__}"
    )
  return _plain(config)


def read_sweep(path: pathlib.Path) -> dict[str, Any]:
  """What `get_sweep()` of a config file returns; empty where it has none.

  Raises:
    InputError: not Python, or not a dict.
  """
  get_sweep = getattr(_execute(path), "get_sweep", None)
  said = {} if get_sweep is None else get_sweep()
  if not isinstance(said, dict):
    raise errors.InputError(
      f"get_sweep of {path} must return a dict, not {type(said).__name__}"
    )
  return said


def default_workdir(reference: str) -> pathlib.Path:
  """`runs/<config>[-<arg>]`."""
  path, arg = split(reference)
  return pathlib.Path("runs") / (f"{path.stem}-{arg}" if arg else path.stem)


def _execute(path: pathlib.Path) -> ModuleType:
  name = f"effjax_config_{path.stem}"
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise errors.InputError(f"{path} is not a Python file (.py)")
  module = importlib.util.module_from_spec(spec)
  written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
  try:
    spec.loader.exec_module(module)
  except (SyntaxError, UnicodeDecodeError) as error:
    raise errors.InputError(f"{path} is not a Python file: {error}") from None
  finally:
    sys.dont_write_bytecode = written
  return module


def _plain(value: Any) -> Any:
  """ConfigDicts, also those inside tuples, as plain dicts."""
  if isinstance(value, ml_collections.FieldReference):
    value = value.get()
  if isinstance(value, ml_collections.ConfigDict | dict):
    return {str(name): _plain(value[name]) for name in value}
  if isinstance(value, list | tuple):
    return tuple(_plain(item) for item in value)
  return value
