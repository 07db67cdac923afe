"""Lanes that take turns on the same tokens, and what each of them measured."""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from effjax.cli.peers import lane as lane_lib
from effjax.cli.peers import machine, process

# Lanes that load at the same time. They never compute at the same time: threads that
# wait for each other busily come to a halt where another process takes their core.
_LOADING = 2
# Between two turns: threads look for work that long before they sleep.
_PAUSE_SECS = 0.1


@dataclasses.dataclass(frozen=True)
class Lane:
  """A system, in one of its formats.

  Attributes:
    system: key of model_files.WRITERS.
    format: of the weights, as the system calls it.
    module: file in this package that runs it.
    needs: packages it imports beyond those of effjax.
  """

  system: str
  format: str
  module: str
  needs: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    """For messages and files."""
    return f"{self.system} {self.format}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """A lane's turns. The best count: noise only adds.

  Attributes:
    about: what the lane says of itself.
    logits: float32 `[2, B, V]`: after the prompt, and after the last token.
    libraries_bytes: resident once the system was imported, or None where the operating
      system does not say, as in the other sizes.
    peak_bytes: resident at most, loading and compiling included.
    turns: those that count.
    others: of each turn, the part of our cores' time that other processes took.
  """

  about: str
  logits: np.ndarray
  libraries_bytes: int | None
  peak_bytes: int | None
  turns: list[lane_lib.Turn]
  others: list[float | None]

  @property
  def prefill_secs(self) -> float:
    """Of the fastest prefill."""
    return min(turn.prefill_secs for turn in self.turns)

  @property
  def step_secs(self) -> float:
    """Median of the tokens of the fastest turn."""
    return min(statistics.median(turn.step_secs) for turn in self.turns)

  def phase_bytes(self, phase: str) -> int | None:
    """Resident at most in a phase, over what the imported system holds.

    Args:
      phase: "prefill" or "decode".
    """
    peaks = [getattr(turn, f"{phase}_peak") for turn in self.turns]
    if self.libraries_bytes is None or None in peaks:
      return None
    return max(peaks) - self.libraries_bytes

  def disturbance(self) -> float | None:
    """The part of our cores that others took in the turns that were the best."""
    both = zip(self.turns, self.others, strict=True)
    found = [
      share
      for turn, share in both
      if share is not None
      and (
        turn.prefill_secs == self.prefill_secs
        or statistics.median(turn.step_secs) == self.step_secs
      )
    ]
    return max(found, default=None)


def compare(
  lanes: Sequence[Lane],
  place: pathlib.Path,
  tokens_BL: np.ndarray,
  prompt: int,
  rounds: int,
  say: Callable[[str], None],
) -> dict[Lane, Measured]:
  """Lets every lane prefill and decode the tokens in turns, so many times over.

  Args:
    lanes: their models are `place / lane.name`.
    place: folder of the models; what is written besides goes away again.
    tokens_BL: int32; a prompt, and what is fed after it.
    prompt: tokens of the prompt.
    rounds: turns of each that count, after one that does not.
    say: told what is going on.

  Raises:
    EffjaxError: a lane failed; with what it said.
  """
  with contextlib.ExitStack() as stack:
    made = stack.enter_context(tempfile.TemporaryDirectory(dir=place))
    folder = pathlib.Path(made)
    tokens = folder / "tokens.npy"
    np.save(tokens, tokens_BL)

    def load(lane: Lane) -> tuple[process.Process, dict[str, Any]]:
      options = lane_lib.Options(
        model=str(place / lane.name),
        format=lane.format,
        tokens=str(tokens),
        prompt=prompt,
        threads=len(machine.cores()),
      )
      log = folder / f"{lane.name}.log"
      started = process.Process(lane.name, lane.module, options, log)
      running = stack.enter_context(started)
      return running, running.answer()

    say(f"batch {len(tokens_BL)}: loading {len(lanes)} models, and one turn of each")
    with concurrent.futures.ThreadPoolExecutor(_LOADING) as pool:
      loaded = dict(zip(lanes, pool.map(load, lanes), strict=True))
    logits = {
      lane: _first_turn(running, folder) for lane, (running, _) in loaded.items()
    }
    turns: dict[Lane, list[lane_lib.Turn]] = {lane: [] for lane in lanes}
    others: dict[Lane, list[float | None]] = {lane: [] for lane in lanes}
    for k in range(rounds):
      say(f"batch {len(tokens_BL)}: round {k + 1} of {rounds}")
      for lane, (running, _) in loaded.items():
        time.sleep(_PAUSE_SECS)
        watch = machine.Others()
        turn = lane_lib.Turn(**running.ask("turn"))
        others[lane].append(watch.share(turn.cpu_secs))
        turns[lane].append(turn)
    return {
      lane: Measured(
        **said,
        **running.ask("close"),
        logits=logits[lane],
        turns=turns[lane],
        others=others[lane],
      )
      for lane, (running, said) in loaded.items()
    }


def _first_turn(running: process.Process, folder: pathlib.Path) -> np.ndarray:
  """The turn in which a lane compiles and allocates, and that tells its logits."""
  path = folder / f"{running.name}.npy"
  running.ask("turn", logits=str(path))
  return np.load(path)
