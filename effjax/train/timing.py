"""A stopwatch that knows which part of the time was training."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

WARMUP_STEPS = 2


class Chrono:
  """Times steps, without compilation, evaluation and checkpoints; outlives restarts.

  After every start the first WARMUP_STEPS steps are left out of the rates: they hold
  compilation and first touches of memory. All times in seconds.
  """

  def __init__(
    self, num_steps: int, step: int = 0, clock: Callable[[], float] = time.monotonic
  ):
    """Starts to count.

    Args:
      num_steps: steps of the whole training.
      step: steps done before this start.
      clock: seconds, rising.
    """
    self._clock = clock
    self._num_steps = num_steps
    self._step = step
    self._warm = step + WARMUP_STEPS
    self._mark = clock()
    self._totals = {"wall_secs": 0.0, "timed_secs": 0.0, "timed_steps": 0}
    self._interval = [0.0, 0.0]

  def tick(self, step: int, tokens: float) -> None:
    """Notes that update number `step` (from 1), of so many tokens, has ended."""
    secs = self._lap()
    self._step = step
    if step <= self._warm:
      return
    self._totals["timed_secs"] += secs
    self._totals["timed_steps"] += 1
    self._interval[0] += secs
    self._interval[1] += tokens

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time spent inside out of the rates, though not out of `wall_secs`."""
    before = self._clock() - self._mark
    try:
      yield
    finally:
      now = self._clock()
      self._totals["wall_secs"] += now - self._mark - before
      self._mark = now - before

  def take_rate(self) -> float | None:
    """Tokens a second since the last call, or None before anything was timed."""
    secs, tokens = self._interval
    self._interval = [0.0, 0.0]
    return tokens / secs if secs > 0 else None

  def eta_secs(self) -> float | None:
    """Expected time to the last step, or None before anything was timed."""
    if not self._totals["timed_steps"]:
      return None
    step_secs = self._totals["timed_secs"] / self._totals["timed_steps"]
    return step_secs * (self._num_steps - self._step)

  @property
  def wall_secs(self) -> float:
    """All time of this training up to the last step, over all of its starts."""
    return self._totals["wall_secs"]

  def state(self) -> dict[str, float]:
    """What a checkpoint keeps."""
    return dict(self._totals)

  def restore(self, state: Mapping[str, float]) -> None:
    """Continues from a checkpoint's totals."""
    self._totals = {name: state[name] for name in self._totals}

  def _lap(self) -> float:
    now = self._clock()
    secs, self._mark = now - self._mark, now
    self._totals["wall_secs"] += secs
    return secs
