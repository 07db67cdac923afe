"""Which values of a parametrized test run each time, and which in `make test-all`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], each_time: Collection[Any]) -> list[Any]:
  """All of `values` as parameters, those not in `each_time` marked slow."""
  values = list(values)
  unknown = [value for value in each_time if value not in values]
  if unknown:
    raise ValueError(f"{unknown[0]!r} is none of the values")
  return [
    value if value in each_time else pytest.param(value, marks=pytest.mark.slow)
    for value in values
  ]
