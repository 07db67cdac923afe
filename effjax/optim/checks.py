"""Range checks that the options of several optimizers and schedules share.

Each raises InputError with one line that names the field.
"""

from collections.abc import Iterable
from typing import Any

from effjax.core import config, errors


def check_decay_rates(options: Any, *names: str) -> None:
  """Each of the named fields is the decay of a running mean: 0 <= value < 1."""
  for name in names:
    value = getattr(options, name)
    config.require(0 <= value < 1, f"{name} must be at least 0 and below 1: {value}")


def check_fractions(options: Any, *names: str) -> None:
  """Each of the named fields is between 0 and 1."""
  for name in names:
    value = getattr(options, name)
    config.require(0 <= value <= 1, f"{name} must be between 0 and 1: {value}")


def check_positive(options: Any, *names: str) -> None:
  """Each of the named fields is above zero."""
  for name in names:
    value = getattr(options, name)
    config.require(value > 0, f"{name} must be positive: {value}")


def check_not_negative(options: Any, *names: str) -> None:
  """Each of the named fields is zero or more, or None."""
  for name in names:
    value = getattr(options, name)
    config.require(value is None or value >= 0, f"{name} must not be negative: {value}")


def check_choice(options: Any, name: str, allowed: Iterable[str]) -> None:
  """The named field is one of the allowed words, or None."""
  value = getattr(options, name)
  if value is not None and value not in allowed:
    raise errors.unknown(name, value, allowed)


def check_momentum_dtype(options: Any) -> None:
  """`momentum_dtype` is None or a dtype momentum can be held in."""
  check_choice(options, "momentum_dtype", ("float32", "bfloat16"))
