"""A trace of some training steps, for TensorBoard or Perfetto."""

import pathlib
from typing import Any

import grain
import jax

# Steps before the trace: compilation and first touches of memory are left out.
_SKIPPED = 5
_TRACED = 5


class Profiled(grain.DatasetIterator):
  """Batches of another iterator; while a few of them are used, a trace is taken.

  The loop asks for one batch a step, so steps can be counted here.
  """

  def __init__(self, batches: grain.DatasetIterator, directory: pathlib.Path):
    super().__init__(batches)
    self._directory = directory
    self._count = 0
    self._tracing = False

  def __next__(self) -> Any:
    self._count += 1
    if self._count == _SKIPPED + 1:
      jax.profiler.start_trace(str(self._directory))
      self._tracing = True
    if self._count == _SKIPPED + _TRACED + 1:
      self._stop()
    return next(self._parent)

  def get_state(self) -> dict[str, Any]:
    return self._parent.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    self._parent.set_state(state)

  def close(self) -> None:
    self._stop()
    super().close()

  def _stop(self) -> None:
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
