"""SIGTERM and SIGINT ask a run to stop; it finishes its step and saves.

A signal reaches the processes of a run at different places, if it reaches all of them
at all (a host may be preempted alone). There JAX's coordination service agrees on the
place: each process counts the places where it could stop, which are the same in all,
and they stop at the first one that none of them has passed. SIGTERM is what the service
listens for; SIGINT is passed on to it. Places are steps, batches of an evaluation, and
the beginnings of stages.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
  """Raised inside `interruptible` code when a stop is asked for."""


class StopRequest:
  """Whether someone asked the run to stop; use as a context manager.

  A second signal is handled as it would be without effjax, so that an impatient second
  Ctrl-C ends the process.
  """

  def __init__(self):
    self.requested: signal.Signals | None = None
    self._interruptible = False
    self._caught = contextlib.ExitStack()

  def __enter__(self) -> "StopRequest":
    self._caught.enter_context(caught(self._handle))
    return self

  def __exit__(self, *unused: object) -> None:
    self._caught.close()

  def at(self) -> bool:
    """Whether to stop here, between two updates; the same in every process."""
    if _agreed():
      self.requested = signal.SIGTERM
    return self.requested is not None

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """Code that may be left, such as an evaluation: anywhere, or where it asks `check`.

    Raises:
      Interrupted: a signal arrived before or inside.
    """
    if self.requested is not None:
      raise Interrupted
    self._interruptible = True
    try:
      yield
    except Interrupted:
      self.requested = self.requested or signal.SIGTERM
      raise
    finally:
      self._interruptible = False

  def _handle(self, number: signal.Signals) -> None:
    self.requested = number
    if self._interruptible:
      raise Interrupted


def check() -> None:
  """Leaves interruptible code if all processes stop here; asked at the same places.

  A process alone is interrupted by the signal itself.

  Raises:
    Interrupted: they do.
  """
  if _agreed():
    raise Interrupted(signal.SIGTERM.name)


@contextlib.contextmanager
def caught(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
  """While open, the first SIGTERM or SIGINT goes to `handle`.

  In a run of several processes it goes to the coordination service, which has a handler
  of its own.
  """

  def restore() -> None:
    for number, handler in previous.items():
      signal.signal(number, handler)

  def handler(number: int, frame: FrameType | None) -> None:
    del frame
    restore()  # An impatient second Ctrl-C ends the process.
    handle(signal.Signals(number))

  def pass_on(number: int, frame: FrameType | None) -> None:
    del number, frame
    restore()
    os.kill(os.getpid(), signal.SIGTERM)

  handlers = {number: handler for number in _SIGNALS}
  if jax.process_count() > 1:
    handlers = {signal.SIGINT: pass_on}
  previous = {}
  if threading.current_thread() is threading.main_thread():
    previous = {n: signal.signal(n, handler) for n, handler in handlers.items()}
  try:
    yield
  finally:
    restore()


class _Vote:
  """What the processes of a run have agreed on."""

  def __init__(self):
    self._places = 0
    self._stop = False

  def __call__(self) -> bool:
    """Whether to stop at this place, which is counted."""
    if jax.process_count() == 1:
      return False
    self._places += 1
    # True at one place only; after it there is no way back.
    if multihost_utils.reached_preemption_sync_point(self._places):
      self._stop = True
    return self._stop


_agreed = _Vote()
