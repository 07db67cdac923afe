"""Techniques are found by file name: the file, the config's word and the CLI's word.

There is no list to edit and no plugin framework: `find("effjax.nn.mixers", "mamba2")`
imports `effjax/nn/mixers/mamba2.py` and returns its module-level `TECHNIQUE`.
"""

import functools
import importlib
import pkgutil
from typing import Any

from effjax.core import errors


@functools.cache
def names(package: str) -> tuple[str, ...]:
  """The registry keys of a package, sorted: its public modules that hold a technique.

  Files whose name starts with an underscore are shared code of the package, and
  `api`, `base` and `reference` are never techniques.
  """
  module = importlib.import_module(package)
  skipped = ("api", "base", "reference")
  return tuple(
    sorted(
      info.name
      for info in pkgutil.iter_modules(module.__path__)
      if not info.name.startswith("_") and info.name not in skipped
    )
  )


def find(package: str, name: str, kind: str | None = None) -> Any:
  """The technique `name` of a package: the `TECHNIQUE` of the file of that name.

  Args:
    package: dotted package, such as "effjax.nn.mixers".
    name: registry key, equal to the file name.
    kind: what to call it in an error; the package's last word by default.

  Raises:
    InputError: there is no such technique; the message names the nearest one.
  """
  if name not in names(package):
    names.cache_clear()  # A file may be new, as in a notebook.
  if name not in names(package):
    kind = kind or package.rsplit(".", 1)[-1].rstrip("s")
    raise errors.unknown(kind, name, names(package))
  return importlib.import_module(f"{package}.{name}").TECHNIQUE


def summary(package: str, name: str) -> str:
  """The first line of the docstring of a technique's file."""
  doc = importlib.import_module(f"{package}.{name}").__doc__ or ""
  return doc.strip().split("\n", 1)[0].rstrip(".")
