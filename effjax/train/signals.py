"""SIGTERM and SIGINT ask the loop to stop; it finishes its step and saves."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
  """Raised inside `interruptible` code when a stop is asked for."""


class StopRequest:
  """Whether someone asked the run to stop; use as a context manager.

  A second signal is handled as it would be without effjax, so that an impatient second
  Ctrl-C ends the process. With several processes the signal reaches them at different
  steps; there JAX's coordination service agrees on one, and no handler is installed.
  """

  def __init__(self):
    self.requested: signal.Signals | None = None
    self._interruptible = False
    self._previous: dict[signal.Signals, object] = {}

  def __enter__(self) -> "StopRequest":
    main = threading.current_thread() is threading.main_thread()
    if main and jax.process_count() == 1:
      for number in _SIGNALS:
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused: object) -> None:
    self._restore()

  def at(self, step: int) -> bool:
    """Whether to stop after `step` updates; the same answer in every process."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.requested is not None

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """Code that may be left at any point, such as an evaluation.

    Raises:
      Interrupted: a signal arrived before or inside.
    """
    if self.requested is not None:
      raise Interrupted
    self._interruptible = True
    try:
      yield
    finally:
      self._interruptible = False

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.requested = signal.Signals(number)
    self._restore()
    if self._interruptible:
      raise Interrupted

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
