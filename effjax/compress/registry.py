"""All transforms by name, across the packages that hold them."""

import pkgutil

import effjax.compress as compress
from effjax.core import errors, registry, technique


def packages() -> tuple[str, ...]:
  """Dotted names of the packages of transforms, such as effjax.compress.prune."""
  return tuple(
    f"{compress.__name__}.{info.name}"
    for info in pkgutil.iter_modules(compress.__path__)
    if info.ispkg
  )


def names() -> dict[str, str]:
  """Every transform's name and the package it is in."""
  return {name: package for package in packages() for name in registry.names(package)}


def find(name: str) -> technique.Transform | technique.ModelTransform:
  """The transform `name`.

  Raises:
    InputError: there is none of that name; the nearest one is given.
  """
  found = names()
  if name not in found:
    raise errors.unknown("transform", name, found)
  return registry.find(found[name], name)
