"""The outside of a lane: starts its process, asks it, and ends it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

from effjax.cli.peers import lane
from effjax.core import errors


class Process:
  """A lane while it runs; use it as a context, which ends it.

  Attributes:
    name: of the row, for messages.
  """

  def __init__(self, name: str, module: str, options: lane.Options, log: pathlib.Path):
    """Starts a lane, which then loads its model.

    Args:
      name: of the row.
      module: its file in this package.
      options: what it is told.
      log: file for what it prints; it must not exist.
    """
    self.name = name
    self._log = log
    with log.open("x", encoding="utf-8") as file:
      self._process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.{module}", json.dumps(vars(options))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=file,
        text=True,
        env=os.environ | environment(options.threads),
      )

  def __enter__(self) -> "Process":
    return self

  def __exit__(self, *error: Any) -> None:
    self._process.kill()
    self._process.communicate()

  def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
    """Sends a command and waits for the answer; see lane.serve.

    Raises:
      EffjaxError: the process ended instead.
    """
    command = json.dumps({"do": do, **arguments})
    try:
      self._process.stdin.write(command + "\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # The answer will be missing, too, and then it is said why.
    return self.answer()

  def answer(self) -> dict[str, Any]:
    """What the process says next: the first answer comes once its model is loaded.

    Raises:
      EffjaxError: the process ended instead; with the last line it printed.
    """
    line = self._process.stdout.readline()
    if line:
      return json.loads(line)
    code = self._process.wait()
    said = self._log.read_text("utf-8", errors="replace").strip().splitlines()
    reason = said[-1].strip() if said else "it said nothing"
    if code < 0:
      reason = f"ended by {signal.Signals(-code).name}, after it said: {reason}"
    raise errors.EffjaxError(f"{self.name} failed: {reason}")


def environment(threads: int) -> dict[str, str]:
  """Variables of every lane: so many threads, on the CPU, without a network."""
  count = str(threads)
  return {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "JAX_PLATFORMS": "cpu",
    "MKL_NUM_THREADS": count,
    "NPROC": count,  # XLA's
    "OMP_NUM_THREADS": count,
  }
