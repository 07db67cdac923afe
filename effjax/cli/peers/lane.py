"""The inside of a lane: one system with one model in a process of its own.

    python -m effjax.cli.peers.transformers_lane '{"model": "hf-float32", ...}'

Once the model is loaded, the process answers commands, a JSON object a line each:

    {"do": "turn"}                 prefills and decodes the given tokens; see Turn
    {"do": "turn", "logits": FILE} also writes logits float32 `[2, B, V]`: after the
                                   prompt, and after the last token
    {"do": "close"}                the peak of the whole process; it ends

Whatever a library prints goes to stderr. A lane that fails ends with a traceback there.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO, runtime_checkable

import numpy as np

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR_REFS = pathlib.Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What every lane is told.

  Attributes:
    model: file or folder of the model.
    format: of the table's row, such as "bfloat16".
    tokens: file of int32 `[B, prompt + steps]`: what each row reads, then is fed.
    prompt: tokens of a prompt.
    threads: that compute.
  """

  model: str
  format: str
  tokens: str
  prompt: int
  threads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
  """What a lane measured in one turn.

  Attributes:
    prefill_secs: until the logits after the prompts were there.
    step_secs: the same for every token that was fed, one a row.
    cpu_secs: CPU time of the process, all threads.
    prefill_peak: bytes resident at most while prefilling, or None where the system
      does not say.
    decode_peak: the same while decoding.
  """

  prefill_secs: float
  step_secs: list[float]
  cpu_secs: float
  prefill_peak: int | None
  decode_peak: int | None


@runtime_checkable
class System(Protocol):
  """A loaded model that decodes rows of equal length.

  Attributes:
    about: versions, and what a reader should know of how it computes.
  """

  about: str

  def prefill(self, tokens_BL: np.ndarray) -> None:
    """Forgets what came before and reads prompts, until their logits are there."""

  def step(self, token_B: np.ndarray) -> None:
    """Reads one more token a row, until their logits are there."""

  def logits(self) -> np.ndarray:
    """float32 `[B, V]` after the last tokens."""


def serve(load: Callable[[Options, int, int], System]) -> None:
  """Loads a system as argv[1] says, and answers commands until stdin ends.

  Args:
    load: is called with the options, the rows and the tokens a row must hold.
  """
  replies = _own_stdout()
  options = Options(**json.loads(sys.argv[1]))
  tokens_BL = np.load(options.tokens)
  held = _resident("VmRSS")
  system = load(options, *tokens_BL.shape)
  _say(replies, about=system.about, libraries_bytes=held)
  peak = _Peak()
  for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "close":
      _say(replies, peak_bytes=peak.of_process())
      return
    found = _turn(system, tokens_BL, options.prompt, peak, command.get("logits"))
    _say(replies, **dataclasses.asdict(found))


def _turn(
  system: System, tokens_BL: np.ndarray, prompt: int, peak: "_Peak", path: str | None
) -> Turn:
  seen = []

  def timed(fn: Callable[[np.ndarray], None], tokens: np.ndarray) -> float:
    tokens = np.ascontiguousarray(tokens)
    start = time.perf_counter()
    fn(tokens)
    return time.perf_counter() - start

  def look() -> None:
    if path is not None:
      seen.append(np.array(system.logits(), np.float32))

  cpu = time.process_time()
  peak.reset()
  prefill_secs = timed(system.prefill, tokens_BL[:, :prompt])
  prefill_peak = peak.reset()
  look()
  step_secs = [timed(system.step, token_B) for token_B in tokens_BL[:, prompt:].T]
  decode_peak = peak.reset()
  look()
  if path is not None:
    np.save(path, np.stack(seen))
  return Turn(
    prefill_secs=prefill_secs,
    step_secs=step_secs,
    cpu_secs=time.process_time() - cpu,
    prefill_peak=prefill_peak,
    decode_peak=decode_peak,
  )


class _Peak:
  """The largest resident size of this process, by phases."""

  def __init__(self):
    self._highest = 0

  def reset(self) -> int | None:
    """Bytes at most since the last call, or None on a system that does not say."""
    found = _resident("VmHWM")
    self._highest = max(self._highest, found or 0)
    try:
      _CLEAR_REFS.write_text("5")
    except OSError:
      return None
    return found

  def of_process(self) -> int | None:
    """Bytes at most since the process began."""
    return max(self._highest, _resident("VmHWM") or 0) or None


def _resident(field: str) -> int | None:
  """VmRSS (now) or VmHWM (at most) in bytes; None on a system that does not say."""
  try:
    lines = _STATUS.read_text().splitlines()
  except OSError:
    return None
  (found,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
  return int(found) * 1024


def _own_stdout() -> TextIO:
  """Standard output for replies alone: everything else that is printed is moved."""
  replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  return replies


def _say(replies: TextIO, **values: Any) -> None:
  replies.write(json.dumps(values) + "\n")
  replies.flush()
