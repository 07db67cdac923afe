"""Leaves as plain JSON values, so that a file says what must be read from it.

A description names kind, version, static metadata and, for every data field, an array
(shape and dtype), a nested leaf or nothing. `abstract` turns it back into a leaf of
shapes, which is the target a restore reads into.
"""

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import errors, registry
from effjax.weights import leaf as leaf_lib

LEAVES = "effjax.weights.leaves"
ARRAY = "array"


def describe(leaf: Any) -> dict[str, Any] | None:
  """A parameter as plain JSON values; None for a field that is absent.

  Args:
    leaf: an array or ShapeDtypeStruct, a leaf dataclass of them, or None.
  """
  if leaf is None:
    return None
  if not leaf_lib.is_leaf_kind(leaf):
    return {
      "kind": ARRAY,
      "shape": list(leaf.shape),
      "dtype": jnp.dtype(leaf.dtype).name,
    }
  return {
    "kind": leaf.kind,
    "version": leaf.version,
    "static": {name: _to_json(getattr(leaf, name)) for name in leaf.static_fields},
    "data": {name: describe(getattr(leaf, name)) for name in leaf.data_fields},
  }


def abstract(description: Any, path: str = "parameter") -> Any:
  """The leaf a description stands for, of jax.ShapeDtypeStruct.

  A field that the description lacks takes its default where the kind has one: a kind
  may gain fields, and what was written before stays readable.

  Args:
    description: what `describe` returned, perhaps by way of a file.
    path: of the parameter, for messages.

  Raises:
    InputError: an unknown kind, a version from the future, fields that the kind does
      not have, or none where it needs one; the message names `path`.
  """
  if description is None:
    return None
  if not isinstance(description, Mapping) or "kind" not in description:
    raise errors.InputError(f"{path}: {description!r} does not describe a parameter")
  if description["kind"] == ARRAY:
    return _abstract_array(description, path)
  cls = _leaf_class(str(description["kind"]), path)
  version = description.get("version")
  if not isinstance(version, int) or version > cls.version:
    raise errors.InputError(
      f"{path}: leaf kind {cls.kind!r} of version {version!r}, this effjax reads up to "
      f"version {cls.version}; use a newer effjax"
    )
  fields = dataclasses.fields(cls)
  needed = {f.name for f in fields if f.default is dataclasses.MISSING}
  for part, wanted in (("static", cls.static_fields), ("data", cls.data_fields)):
    given = description.get(part)
    fits = isinstance(given, Mapping) and needed & set(wanted) <= set(given)
    if not fits or not set(given) <= set(wanted):
      raise errors.InputError(
        f"{path}: leaf kind {cls.kind!r} has the {part} fields {list(wanted)}, "
        f"the description has {given if given is None else list(given)}"
      )
  static = {name: _from_json(v) for name, v in description["static"].items()}
  data = {
    name: abstract(value, f"{path}.{name}")
    for name, value in description["data"].items()
  }
  return cls(**static, **data)


def arrays(path: str, leaf: Any) -> Iterator[tuple[str, Any]]:
  """Every array of a parameter with a name: `path`, or `path.codes` and so on.

  Nested leaves give `path.values.codes`. Also works on leaves of shapes or shardings.
  """
  if leaf is None:
    return
  if not leaf_lib.is_leaf_kind(leaf):
    yield path, leaf
    return
  for name in leaf.data_fields:
    yield from arrays(f"{path}.{name}", getattr(leaf, name))


def _leaf_class(kind: str, path: str) -> type[leaf_lib.Leaf]:
  known = registry.names(LEAVES)
  if kind not in known:
    raise errors.unknown(f"leaf kind of {path}", kind, (*known, ARRAY))
  module = importlib.import_module(f"{LEAVES}.{kind}")
  return next(
    value
    for value in vars(module).values()
    if isinstance(value, type)
    and issubclass(value, leaf_lib.Leaf)
    and value.__module__ == module.__name__
  )


def _abstract_array(description: Mapping[str, Any], path: str) -> jax.ShapeDtypeStruct:
  shape, dtype = description.get("shape"), description.get("dtype")
  whole = isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)
  if not whole or not isinstance(dtype, str):
    raise errors.InputError(f"{path}: {dict(description)} does not describe an array")
  try:
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
  except TypeError:
    raise errors.InputError(f"{path}: {dtype!r} is no dtype") from None


def _to_json(value: Any) -> Any:
  return [_to_json(v) for v in value] if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
  return tuple(_from_json(v) for v in value) if isinstance(value, list) else value
