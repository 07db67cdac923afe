"""Foreign configs: fields of JSON that are read with one clear line per mistake."""

from collections.abc import Mapping
from typing import Any

from effjax.core import errors

_MISSING = object()


class Fields:
  """The fields of a foreign config.

  Attributes:
    values: as they were read.
    where: of the file, for messages.
  """

  def __init__(self, values: Mapping[str, Any], where: str):
    """Wraps what was read from the file `where`."""
    self.values = dict(values)
    self.where = where

  def get(self, name: str, kind: type, default: Any = _MISSING) -> Any:
    """A field of a type; an absent one, or null, is the default.

    Args:
      name: of the field.
      kind: int, float, bool, str, list or dict; an int is taken for a float.
      default: used if there is no such field.

    Raises:
      InputError: it is missing and has no default, or of another type.
    """
    value = self.values.get(name)
    if value is None:
      if default is _MISSING:
        raise errors.InputError(f"{self.where} has no field {name!r}")
      return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
      raise errors.InputError(
        f"{self.where}: {name} must be {kind.__name__}, got {value!r}"
      )
    return value

  def refuse(self, **allowed: Any) -> None:
    """Fields that change the function and have only one value here.

    Args:
      **allowed: the value each may have where it is given, or a tuple of them.

    Raises:
      InputError: one has another value.
    """
    for name, value in allowed.items():
      values = value if isinstance(value, tuple) else (value,)
      given = self.values.get(name)
      if given is not None and given not in values:
        wanted = " or ".join(map(repr, values))
        raise errors.InputError(
          f"{self.where}: {name}={given!r} is not supported; effjax has {wanted}"
        )
