"""Whether a function is traced only to count what it computes.

Kernels and loops of a length known at run time show no products to whoever walks a
trace. Operations that have such forms look here, and trace as an equal form that does.
"""

import contextlib
import contextvars
from collections.abc import Iterator

_active: contextvars.ContextVar[bool] = contextvars.ContextVar(
  "counting", default=False
)


@contextlib.contextmanager
def counting() -> Iterator[None]:
  """While open, operations trace as forms whose products can be counted."""
  token = _active.set(True)
  try:
    yield
  finally:
    _active.reset(token)


def active() -> bool:
  """Whether `counting` is open."""
  return _active.get()
