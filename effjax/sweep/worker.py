"""One worker of a sweep: claims points and runs each as an ordinary `effjax run`.

A run is a process of its own, so one that crashes or is killed for memory takes nothing
with it, and every run has the accelerator to itself. Start as many workers as there is
room for, anywhere the sweep's folder is mounted, by the same command.
"""

import contextlib
import dataclasses
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from effjax.core import errors
from effjax.recipe import folder as run_folder
from effjax.report import sweep as manifest
from effjax.sweep import points as points_lib
from effjax.sweep import store as store_lib

# A worker's run is its own, also where a cluster started several workers.
_RUN = (sys.executable, "-m", "effjax", "run", "--dist=off")
# Seconds between two looks at what other workers do.
_POLL_SECS = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """How a sweep ended: number of trials, and why some have no result."""

  num_trials: int
  failed: dict[int, str]


def work(
  sweep: points_lib.Sweep,
  root: pathlib.Path,
  url: str | None = None,
  *,
  heartbeat_secs: int = store_lib.HEARTBEAT_SECS,
  command: Sequence[str] = _RUN,
) -> Outcome:
  """Runs points until all of the sweep's are done, by this worker or another.

  Args:
    sweep: what to run.
    root: the sweep's folder; runs lie in `trials/<number>`, their output in `logs`.
    url: of the store; SQLite in the folder if None.
    heartbeat_secs: between two signs of life; a worker silent for four is dead.
    command: what runs a recipe, given the arguments of `effjax run`.

  Raises:
    InputError: a point's config is wrong, the store cannot be reached, or the folder
      holds another sweep; nothing has run then.
    StoppedError: SIGTERM or SIGINT came; the same call goes on.
  """
  points = sweep.points()
  _check(sweep, points)
  manifest.check_free(root)
  store = store_lib.Store(root, url, heartbeat_secs)
  about = sweep.about()
  store.join(about, () if sweep.search else points, sweep.search)
  tell = lambda: manifest.write(root, about, points_lib.SEED_FIELDS, store.points())
  tell()
  state = store.state()
  num_trials = len(state.numbers) + state.num_missing
  _say(f"{root}: {num_trials} trials, {len(state.open) + state.num_missing} to do")
  worker = _Worker(sweep=sweep, root=root, store=store, command=tuple(command))
  with _forwarding(worker):
    while not worker.stopped:
      trial = store.claim()
      if trial is not None:
        if sweep.search is not None:
          tell()
        worker.run(trial)
        continue
      still = store.state().open
      if not still:
        break
      worker.wait(still)
  if worker.stopped:
    raise errors.StoppedError(
      f"stopped by {worker.stopped}; its trial waits to be resumed: the same command "
      "goes on"
    )
  state = store.state()
  return Outcome(num_trials=len(state.numbers), failed=dict(state.failed))


class _Worker:
  """The runs of one worker, one at a time."""

  def __init__(
    self,
    *,
    sweep: points_lib.Sweep,
    root: pathlib.Path,
    store: store_lib.Store,
    command: tuple[str, ...],
  ):
    self.stopped = ""  # The signal that asked this worker to stop.
    self._sweep, self._root, self._store = sweep, root, store
    self._command = command
    self._process: subprocess.Popen | None = None
    self._told = False  # Whether the process knows; a second signal would kill it.
    self._waiting_for: tuple[int, ...] = ()

  def stop(self, name: str) -> None:
    """Asks the run to save and end, and starts no other."""
    self.stopped = name
    if self._process is not None and not self._told:
      self._told = True
      self._process.send_signal(signal.SIGTERM)

  def wait(self, still: tuple[int, ...]) -> None:
    """Waits a little for trials of other workers, which may turn out to be dead."""
    if still != self._waiting_for:
      self._waiting_for = still
      _say(f"waiting for {len(still)} trials of other workers: {_list(still)}")
    time.sleep(_POLL_SECS)

  def run(self, trial: store_lib.Trial) -> None:
    """Runs a claimed trial and tells the store how it ended."""
    name = f"trials/{trial.number:04d}"
    _say(f"{name}: {points_lib.describe(trial.point)}")
    start = time.monotonic()
    with self._store.alive(trial):
      code = self._run_process(trial)
    if self.stopped:
      self._store.release(trial)
      return
    loss, reason = self._result(trial, code)
    if reason is None:
      kept = self._store.finish(trial, loss)
      said = f"loss {loss:.4f}, {time.monotonic() - start:.0f} s"
    else:
      kept = self._store.fail(trial, reason)
      said = f"{reason}; see {self._log(trial)}"
    _say(f"{name}: {said}" + ("" if kept else " (another worker has taken it over)"))

  def _run_process(self, trial: store_lib.Trial) -> int:
    """The exit code of the run, once nobody else is running in its folder."""
    folder = self._folder(trial)
    reference, changes = self._sweep.run_arguments(trial.point)
    while not self.stopped:
      if run_folder.busy(folder):
        # What a killed worker leaves behind may be a run that goes on without it.
        time.sleep(_POLL_SECS)
        continue
      arguments = ["--config", reference, *changes, "--workdir", str(folder)]
      self._log(trial).parent.mkdir(exist_ok=True)
      with open(self._log(trial), "a", encoding="utf-8") as log:
        # In a session of its own: Ctrl-C is for the worker, which passes it on.
        self._process = subprocess.Popen(
          [*self._command, *arguments],
          stdout=log,
          stderr=subprocess.STDOUT,
          stdin=subprocess.DEVNULL,
          start_new_session=True,
        )
      if self.stopped:  # While the process was being started.
        self.stop(self.stopped)
      code = self._process.wait()
      self._process = None
      if code != errors.InputError.exit_code or not run_folder.busy(folder):
        return code
    return errors.StoppedError.exit_code

  def _result(self, trial: store_lib.Trial, code: int) -> tuple[float, str | None]:
    """The loss of the last stage, or why there is none."""
    if code == errors.DivergedError.exit_code:
      return 0.0, store_lib.DIVERGED
    if code < 0:
      return 0.0, f"killed by {signal.Signals(-code).name}"
    if code:
      return 0.0, self._last_words(trial) or f"exit code {code}"
    result = run_folder.read_json(self._folder(trial) / run_folder.RESULT)
    loss = result["stages"][-1]["quality"]["loss"]
    return (0.0, store_lib.DIVERGED) if loss is None else (loss, None)

  def _last_words(self, trial: store_lib.Trial) -> str:
    lines = self._log(trial).read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("effjax: error: ") if lines else ""

  def _folder(self, trial: store_lib.Trial) -> pathlib.Path:
    return manifest.trial_folder(self._root, trial.number)

  def _log(self, trial: store_lib.Trial) -> pathlib.Path:
    return self._root / "logs" / f"{trial.number:04d}.log"


def _check(sweep: points_lib.Sweep, points: Sequence[points_lib.Point]) -> None:
  """Whether every point has a config; seeds make no difference to that."""
  seen: list[dict[str, str]] = []
  for point in points:
    seedless = {f: v for f, v in point.items() if f not in points_lib.SEED_FIELDS}
    if seedless not in seen:
      seen.append(seedless)
      sweep.check(point)


@contextlib.contextmanager
def _forwarding(worker: _Worker) -> Iterator[None]:
  """The first SIGTERM or SIGINT stops the worker; a second one does what it would."""
  previous: dict[int, Callable[..., Any] | int | None] = {}

  def restore() -> None:
    for number, handler in previous.items():
      signal.signal(number, handler)

  def stop(number: int, frame: FrameType | None) -> None:
    del frame
    restore()
    _say("stopping: the run saves its state")
    worker.stop(signal.Signals(number).name)

  for number in (signal.SIGTERM, signal.SIGINT):
    previous[number] = signal.signal(number, stop)
  try:
    yield
  finally:
    restore()


def _list(numbers: Sequence[int]) -> str:
  shown = [f"{number:04d}" for number in numbers[:5]]
  return ", ".join(shown) + (", ..." if len(numbers) > 5 else "")


def _say(text: str) -> None:
  sys.stderr.write(text + "\n")
  sys.stderr.flush()
