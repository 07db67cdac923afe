"""What the processes of one run say to each other; alone, a process says nothing.

All of them run the same program. Where one of them decides (the first one, which alone
writes files), the others are told; where all must have come to a point, they meet. The
words go through the key-value store of JAX's coordination service, so nothing here
waits for a device. Every process makes these calls in the same order.
"""

import itertools
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # The public API has no key-value store.
from jax.experimental import multihost_utils

from effjax.core import errors

# How long a process waits for another before it says so and ends.
DEFAULT_TIMEOUT_SECS = 1800.0
# Caches of a network file system show a new file late, but not later than this.
_VISIBLE_SECS = 90.0

_timeout_secs = DEFAULT_TIMEOUT_SECS
_calls = itertools.count()


def set_timeout(secs: float) -> None:
  """Sets how long `meet` and `told` wait for other processes (s)."""
  global _timeout_secs
  _timeout_secs = secs


def timeout_secs() -> float:
  """How long `meet` and `told` wait for other processes (s)."""
  return _timeout_secs


def several() -> bool:
  """Whether this run has more than one process."""
  return jax.process_count() > 1


def first() -> bool:
  """Whether this process is the one that writes files."""
  return jax.process_index() == 0


def client() -> Any:
  """The client of the coordination service; None in a run of one process."""
  return distributed.global_state.client


def introduce() -> tuple[str, ...]:
  """Tells all processes the names of all: host and number of the process.

  Raises:
    LostError: some did not come.
  """
  name = f"{socket.gethostname()}, pid {os.getpid()}"
  client().key_value_set(f"effjax/names/{jax.process_index()}", name)
  meet("all processes to start")
  found = dict(client().key_value_dir_get("effjax/names"))
  by_number = {int(key.rpartition("/")[2]): name for key, name in found.items()}
  return tuple(by_number[i] for i in range(jax.process_count()))


def meet(what: str) -> None:
  """Returns when every process is here.

  Args:
    what: what is waited for, such as "process 0 to write the stage".

  Raises:
    LostError: some did not come in time.
  """
  if not several():
    return
  start = time.monotonic()
  try:
    client().wait_at_barrier(_key(what), _timeout_ms())
  except jax.errors.JaxRuntimeError as error:
    raise _late(error, what, start) from None


def told(what: str, decide: Callable[[], Any]) -> Any:
  """What process 0 decides, in every process.

  Args:
    what: what it does, such as "open the run folder".
    decide: called in process 0 only; returns plain JSON types. What it raises ends
      that process, and with it the run.

  Raises:
    LostError: process 0 did not decide in time.
  """
  if not several():
    return decide()
  key = _key(what)
  if first():
    value = decide()
    client().key_value_set(key, json.dumps(value))
    return value
  start = time.monotonic()
  try:
    return json.loads(client().blocking_key_value_get(key, _timeout_ms()))
  except jax.errors.JaxRuntimeError as error:
    raise _late(error, f"process 0 to {what}", start) from None


def agree(what: str, value: Any, fix: str) -> None:
  """Checks that a value of plain JSON types is the same in every process.

  No process goes on before all have agreed.

  Args:
    what: what it is, such as "the corpus".
    value: what it is here.
    fix: what to do if it is not.

  Raises:
    InputError: it is another one in process 0.
  """
  value = json.loads(json.dumps(value))
  expected = told(f"say {what}", lambda: value)
  if value != expected:
    raise errors.InputError(
      f"{what} is {value!r} in process {jax.process_index()} "
      f"({socket.gethostname()}) and {expected!r} in process 0: {fix}"
    )
  meet(f"all processes to agree on {what}")


def see(path: pathlib.Path) -> None:
  """Waits until this process sees what process 0 has written.

  Raises:
    InputError: it does not, so the folder is not shared.
  """
  deadline = time.monotonic() + min(_VISIBLE_SECS, _timeout_secs / 2)
  while not path.exists():
    if time.monotonic() > deadline:
      raise errors.InputError(
        f"process {jax.process_index()} ({socket.gethostname()}) does not see "
        f"{path.absolute()}, which process 0 wrote: the run folder must be on a file "
        "system that all processes share; choose --workdir there"
      )
    time.sleep(0.1)


def whole(array: Any) -> np.ndarray:
  """An array on the host, put together where other processes hold parts of it.

  Every process must ask for it, and each gets all of it.
  """
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    if not array.is_fully_replicated:
      return np.asarray(multihost_utils.process_allgather(array, tiled=True))
  return np.asarray(array)


def _key(what: str) -> str:
  # Numbered: a process that comes to another place than the others waits in vain, and
  # says for what, rather than take one word for another.
  return f"effjax/{next(_calls)}/{what}"


def _timeout_ms() -> int:
  return round(1000 * _timeout_secs)


def _late(error: Exception, what: str, start: float) -> Exception:
  """The error of a wait that took too long; any other error as it is."""
  if "DEADLINE_EXCEEDED" not in str(error):
    return error
  me, secs = f"process {jax.process_index()}", time.monotonic() - start
  if secs < _timeout_secs / 2:
    return errors.LostError(f"{me} came too late: the others waited for {what}")
  return errors.LostError(
    f"{me} waited {secs:.0f} s for {what}; look for the last line of the others, or "
    "raise --dist-timeout"
  )
