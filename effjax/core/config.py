"""From a mapping a user wrote to frozen dataclasses, with one clear line per mistake.

A config dataclass is frozen and keyword-only; its fields carry plain type annotations
(`int`, `float`, `bool`, `str`, `X | None`, `tuple[X, ...]`, `dict[str, Any]`, another
config dataclass), and its `__post_init__` checks ranges with `require`.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from effjax.core import errors

# The field by which config dataclasses of one union are told apart: its default.
_TAG = "architecture"


def require(condition: bool, message: str) -> None:
  """Raises InputError with `message` unless `condition` holds."""
  if not condition:
    raise errors.InputError(message)


def build(cls: type, values: Any, path: str = "config") -> Any:
  """Builds a config dataclass from a mapping, checking every name and type.

  Args:
    cls: a frozen dataclass.
    values: field name to value; nested mappings for nested dataclasses, lists or
      tuples for `tuple` fields. An `int` is accepted for a `float`.
    path: where these values stand in the whole config, for messages.

  Returns:
    An instance of `cls`.

  Raises:
    InputError: unknown field (with the nearest match), missing field, wrong type, or
      a range error of the dataclass itself, prefixed with `path`.
  """
  if not isinstance(values, Mapping):
    raise errors.InputError(f"{path}: expected fields, got {_show(values)}")
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  for name in values:
    if name not in fields:
      raise errors.unknown(f"field of {path}", str(name), fields)
  hints = typing.get_type_hints(cls)
  given = {
    name: _coerce(hints[name], value, f"{path}.{name}")
    for name, value in values.items()
  }
  for name, field in fields.items():
    has_default = (
      field.default is not dataclasses.MISSING
      or field.default_factory is not dataclasses.MISSING
    )
    if name not in given and not has_default:
      raise errors.InputError(f"{path}.{name} is missing; it has no default")
  try:
    return cls(**given)
  except errors.InputError as error:
    if str(error).startswith("config"):
      raise
    raise errors.InputError(f"{path}: {error}") from None


def to_dict(value: Any) -> Any:
  """A config as plain JSON types (dataclasses to dicts, tuples to lists)."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {str(k): to_dict(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [to_dict(v) for v in value]
  return value


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
  """One line for each leaf in which two plain configs (see `to_dict`) differ."""
  if isinstance(old, dict) and isinstance(new, dict):
    lines = []
    for key in sorted(old.keys() | new.keys()):
      missing = "(absent)"
      lines += differences(
        old.get(key, missing), new.get(key, missing), f"{path}.{key}"
      )
    return lines
  if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    pairs = enumerate(zip(old, new, strict=True))
    return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}[{i}]")]
  return [] if old == new else [f"{path}: {_show(old)} -> {_show(new)}"]


def _coerce(hint: Any, value: Any, path: str) -> Any:
  """`value` as the annotated type `hint`, or an InputError that names `path`."""
  origin = typing.get_origin(hint)
  if hint is Any:
    return value
  if origin in (types.UnionType, typing.Union):
    return _coerce_union(hint, value, path)
  if dataclasses.is_dataclass(hint):
    return value if isinstance(value, hint) else build(hint, value, path)
  if origin is tuple:
    return _coerce_tuple(hint, value, path)
  if origin is dict or hint is dict:
    if not isinstance(value, Mapping):
      raise _mistyped(path, hint, value)
    inner = (typing.get_args(hint) or (Any, Any))[1]
    return {str(k): _coerce(inner, v, f"{path}.{k}") for k, v in value.items()}
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
    return value
  raise _mistyped(path, hint, value)


def _coerce_union(hint: Any, value: Any, path: str) -> Any:
  """The first member of the union that fits.

  Of several config dataclasses the value's `architecture` says which is meant.
  """
  args = typing.get_args(hint)
  if value is None and type(None) in args:
    return None
  if isinstance(value, Mapping):
    tagged = {a.architecture: a for a in args if hasattr(a, _TAG)}
    if len(tagged) > 1:
      tag = value.get(_TAG, next(iter(tagged)))
      if tag not in tagged:
        raise errors.unknown(f"{path}.{_TAG}", str(tag), tagged)
      return build(tagged[tag], value, path)
  failures = []
  for option in (a for a in args if a is not type(None)):
    try:
      return _coerce(option, value, path)
    except errors.InputError as error:
      failures.append(error)
  raise failures[0] if len(failures) == 1 else _mistyped(path, hint, value)


def _coerce_tuple(hint: Any, value: Any, path: str) -> tuple[Any, ...]:
  """`tuple[X, ...]` or a tuple of fixed length, from a list or tuple."""
  args = typing.get_args(hint)
  if isinstance(value, str) or not isinstance(value, list | tuple):
    raise _mistyped(path, hint, value)
  if args[-1] is Ellipsis:
    args = (args[0],) * len(value)
  if len(args) != len(value):
    raise _mistyped(path, hint, value)
  return tuple(
    _coerce(a, v, f"{path}[{i}]")
    for i, (a, v) in enumerate(zip(args, value, strict=True))
  )


def _mistyped(path: str, hint: Any, value: Any) -> errors.InputError:
  name = hint.__name__ if isinstance(hint, type) else str(hint)
  name = name.replace("NoneType", "None")
  return errors.InputError(
    f"{path} must be {name}, got {_show(value)} ({type(value).__name__})"
  )


def _show(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."
