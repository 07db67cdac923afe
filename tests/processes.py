"""Several processes of one run, on this machine, as tests start them."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What C++ says of its own accord, on stderr too.
_NOISE = re.compile(r"\[Gloo\]|[IWEF]\d{4} |\s+@ |RPC: |\d+$|The tasks have|\*\*\* |$")


class Ended(NamedTuple):
  """How a process ended: exit code, stdout, and the lines of stderr that are ours."""

  code: int
  out: str
  lines: list[str]


class Job:
  """Processes that were started together; those that still run are killed at the end.

  Attributes:
    processes: by number.
    port: of the coordinator.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    count: int,
    command: Sequence[str],
    env: Mapping[str, str],
    each: Callable[[int], Sequence[str]] = lambda number: (),
  ):
    """Starts `command` in every process.

    Args:
      folder: current folder, where the output is kept, too.
      count: how many.
      command: what all run.
      env: variables beside this process's own.
      each: arguments of one process, after the command.
    """
    self.port = free_port()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    shared = {
      "PYTHONPATH": path,
      "JAX_PLATFORMS": "cpu",
      "EFFJAX_COORDINATOR": f"127.0.0.1:{self.port}",
      "EFFJAX_NUM_PROCESSES": str(count),
    }
    # A name of its own for every job: outputs of an earlier one stay.
    name = f"output-{time.monotonic_ns()}"
    self._files = [
      [folder / f"{name}-{i}.{kind}" for kind in "oe"] for i in range(count)
    ]
    self.processes = []
    for i, (out, err) in enumerate(self._files):
      own = {"EFFJAX_PROCESS_ID": str(i)}
      with open(out, "w") as out_file, open(err, "w") as err_file:
        self.processes.append(
          subprocess.Popen(
            [*map(str, command), *map(str, each(i))],
            cwd=folder,
            env=os.environ | shared | own | dict(env),
            stdout=out_file,
            stderr=err_file,
          )
        )

  def when(self, reached: Callable[[], bool]) -> "Job":
    """Returns when something is so, or a process has ended."""
    deadline = time.monotonic() + 240
    while not reached() and all(p.poll() is None for p in self.processes):
      assert time.monotonic() < deadline, self.text()
      time.sleep(0.01)
    return self

  def send(self, number: int, name: signal.Signals) -> "Job":
    """Sends a signal to one process."""
    self.processes[number].send_signal(name)
    return self

  def wait(self, secs: float = 240) -> list[Ended]:
    """How all of them end, within some seconds."""
    deadline = time.monotonic() + secs
    try:
      for process in self.processes:
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      raise AssertionError(f"still running after {secs} s: {self.text()}") from None
    finally:
      self.kill()
    return [
      Ended(process.returncode, out.read_text(), lines(err.read_text()))
      for process, (out, err) in zip(self.processes, self._files, strict=True)
    ]

  def text(self, number: int | None = None) -> str:
    """What is on stderr by now, of one process or of all."""
    files = self._files if number is None else [self._files[number]]
    return "\n".join(err.read_text() for _, err in files)

  def kill(self) -> None:
    """Ends what still runs."""
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        process.kill()
      process.wait()


@contextlib.contextmanager
def running(*args, **kwargs) -> Iterator[Job]:
  """A Job that is killed if the test fails."""
  job = Job(*args, **kwargs)
  try:
    yield job
  finally:
    job.kill()


def free_port(ports: Iterable[int] = (0,)) -> int:
  """A port that nobody uses now, the first of some; of any by default."""
  for port in ports:
    with socket.socket() as listening, contextlib.suppress(OSError):
      listening.bind(("127.0.0.1", port))
      return listening.getsockname()[1]
  raise AssertionError("all ports are in use")


def lines(text: str) -> list[str]:
  """The lines of stderr that effjax wrote."""
  return [line for line in text.splitlines() if not _NOISE.match(line)]


def python(code: str) -> list[str]:
  """The command that runs some Python."""
  return [sys.executable, "-c", code]
