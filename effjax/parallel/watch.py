"""Ends every process of a run when one of them ends badly, and says which one it was.

JAX's coordination service finds a dead process by its missing heartbeats, and then
aborts all others from C++, with pages that name a number. Before that, three threads
here wait for bad news, without asking again and again: one at a barrier that nobody
else joins, which fails with the number of the process that died; one at a connection to
process 0, which serves all this and cannot report its own death; one for a key that a
process sets when an error ends it, with the error's line and exit code. So an error of
one process (a folder in use, a full disk) is the error of all, and nobody waits for a
process that has gone, whatever its main thread is blocked in.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed

from effjax.core import errors
from effjax.parallel import hosts

_ENDED = "effjax/ended"
# As long as the service takes (ms): a signed 32-bit number.
_FOREVER_MS = 2**31 - 1
# Processes that end by the same error at once each say so themselves.
_GRACE_SECS = 3.0
# What lets the others read the news from process 0, which serves it.
_FAREWELL_SECS = 3.0
# Between attempts to reach process 0; some of them fit into a delayed abort.
_RETRY_SECS = 1.0
# After this long, an interpreter that hangs while it ends is ended.
_EXIT_SECS = 20.0
# What all processes decide together: nobody has to be told.
_AGREED = (errors.StoppedError, errors.DivergedError)


class Watch:
  """Watches the other processes while it is open; use as a context manager."""

  def __init__(self, names: tuple[str, ...], heartbeat_secs: int):
    """Prepares to watch.

    Args:
      names: of all processes, see hosts.introduce.
      heartbeat_secs: how long the service waits for a heartbeat.
    """
    self._client = hosts.client()
    self._process = jax.process_index()
    self._names = names
    self._heartbeat_secs = heartbeat_secs
    self._leaving = threading.Event()
    self._saying = threading.Lock()
    self._asking: list[threading.Thread] = []

  def __enter__(self) -> "Watch":
    _delay_aborts()
    for watch in (self._await_death, self._await_error):
      self._asking.append(threading.Thread(target=watch, daemon=True))
      self._asking[-1].start()
    threading.Thread(target=self._await_coordinator, daemon=True).start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    del kind, trace
    lost = None
    if error is None or isinstance(error, _AGREED):
      try:
        hosts.meet("all processes to end")
      except (jax.errors.JaxRuntimeError, errors.LostError) as failed:
        error = lost = failed
    if isinstance(error, jax.errors.JaxRuntimeError | errors.LostError):
      # Most likely a collective with a process that has died: then another thread ends
      # this process, and says so.
      time.sleep(self._heartbeat_secs + _FAREWELL_SECS)
    with self._saying:  # Whoever is ending this process keeps it.
      self._leaving.set()
    if error is not None:
      code = getattr(error, "exit_code", 1)
      self._announce(error, code)
      _exit_later(code)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      jax.distributed.shutdown()  # Waits until the others are here, too.
    for thread in self._asking:
      # A thread that comes out of C++ when the interpreter has gone aborts.
      thread.join(_EXIT_SECS / 2)
    if lost is not None:
      raise lost

  def name(self, process: int) -> str:
    """A process, in words."""
    return f"process {process} ({self._names[process]})"

  def _announce(self, error: BaseException, code: int) -> None:
    """Tells the others how this process ends, unless one was faster."""
    line = " ".join(str(error).split())
    if not isinstance(error, errors.EffjaxError):
      line = f"{self.name(self._process)} failed: {type(error).__name__}: {line}"
    said = {"process": self._process, "line": line, "code": code}
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(_ENDED, json.dumps(said))

  def _await_error(self) -> None:
    try:
      said = json.loads(self._client.blocking_key_value_get(_ENDED, _FOREVER_MS))
    except jax.errors.JaxRuntimeError:
      return  # The end of the run, or a death, which the other thread reports.
    if said["process"] == self._process or self._leaving.wait(_GRACE_SECS):
      return
    self._end(said["line"], said["code"], jax.distributed.shutdown)

  def _await_death(self) -> None:
    try:
      self._client.wait_at_barrier(f"effjax/watch/{self._process}", _FOREVER_MS)
    except jax.errors.JaxRuntimeError as error:
      said = obituary(str(error), self._process, self.name, self._heartbeat_secs)
      self._mourn(said)

  def _await_coordinator(self) -> None:
    if self._process == 0:
      return
    host, _, port = distributed.global_state.coordinator_address.rpartition(":")
    failures = 0
    while failures < 3:
      try:
        # The service closes a line on which nothing is said, but it can be had again.
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as line:
          failures = 0
          _keep_alive(line, self._heartbeat_secs)
          with contextlib.suppress(OSError):
            while line.recv(4096):
              pass
      except OSError:
        failures += 1
      time.sleep(_RETRY_SECS)
    self._mourn(f"{self.name(0)}, the coordinator, is dead or cut off")

  def _mourn(self, death: str) -> None:
    if self._leaving.is_set():
      return
    line = (
      f"{death}; {self.name(self._process)} ends too; the same command resumes from "
      "what was saved"
    )
    # Process 0 is the service: it stays until all others have heard.
    self._end(line, 1, lambda: time.sleep(_FAREWELL_SECS if hosts.first() else 0))

  def _end(self, line: str, code: int, farewell: Callable[[], Any]) -> None:
    """Ends this process, whose main thread may be blocked for good."""
    with self._saying:
      if self._leaving.is_set():
        return
      os.write(sys.stderr.fileno(), f"effjax: error: {line}\n".encode())
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        farewell()
      os._exit(code)


def obituary(
  message: str, me: int, name: Callable[[int], str], heartbeat_secs: int
) -> str:
  """Who died, from what the coordination service says.

  Args:
    message: of the error that a barrier failed with.
    me: number of this process.
    name: a process in words.
    heartbeat_secs: how long the service waits for a heartbeat.
  """
  silent = {int(n) for n in re.findall(r"Task (\d+) heartbeat timeout", message)}
  missing = f"no heartbeat for {heartbeat_secs} s"
  if silent == {me}:
    return f"{name(me)} was stopped for a while, or cut off: {missing}"
  if silent:
    who = " and ".join(name(n) for n in sorted(silent - {me}))
    return (
      f"{who} {'is' if len(silent - {me}) == 1 else 'are'} dead or cut off: {missing}"
    )
  left = re.findall(r"task disconnected.*Task: (\d+)", message, re.DOTALL)
  if left:
    return f"{name(int(left[0]))} has left the run before its end"
  return f"{name(0)}, the coordinator, is dead or cut off"


def _keep_alive(line: socket.socket, secs: float) -> None:
  """Has the system find out within about `secs` if a silent line leads nowhere."""
  line.settimeout(None)
  line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  third = max(1, round(secs / 3))
  for name, value in (
    ("TCP_KEEPIDLE", third),
    ("TCP_KEEPINTVL", third),
    ("TCP_KEEPCNT", 2),
  ):
    if hasattr(socket, name):
      line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _delay_aborts() -> None:
  """Lets an aborting process live some seconds longer, for a last word.

  The C++ side aborts within milliseconds of the news. The handler is the C library's
  own `sleep`, which takes the number of the signal (6) for seconds: it needs no
  interpreter, and blocks only the thread that aborts.
  """
  if sys.platform not in ("linux", "darwin"):
    return
  library = ctypes.CDLL(None)
  library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
  library.signal.restype = ctypes.c_void_p
  library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _exit_later(code: int) -> None:
  """Ends the process if its interpreter hangs on the way out.

  Devices may still wait for others that have gone.
  """
  timer = threading.Timer(_EXIT_SECS, os._exit, (code,))
  timer.daemon = True
  timer.start()
