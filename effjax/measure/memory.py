"""Peak memory of a stage: the accelerator's, or this process's where there is none."""

import pathlib

import jax

_CLEAR_REFS = pathlib.Path("/proc/self/clear_refs")
_STATUS = pathlib.Path("/proc/self/status")


class Peak:
  """Peak memory since this object was made.

  On an accelerator it is the allocator's peak on the busiest local device. That one
  cannot be reset, so a stage that stays below an earlier peak has none of its own.
  Elsewhere it is the largest resident size of the process (VmHWM), reset by writing 5
  to `/proc/self/clear_refs`.
  """

  def __init__(self):
    self._device_before = _device_peak()
    self._was_reset = self._device_before is None and _reset()

  def read(self) -> int | None:
    """Peak bytes, or None where they cannot be known."""
    if self._device_before is not None:
      now = _device_peak()
      return now if now is not None and now > self._device_before else None
    return resident_peak() if self._was_reset else None


def resident_peak() -> int | None:
  """VmHWM of this process in bytes, or None on a system that has none."""
  try:
    lines = _STATUS.read_text().splitlines()
  except OSError:
    return None
  for line in lines:
    if line.startswith("VmHWM:"):
      return int(line.split()[1]) * 1024
  return None


def _reset() -> bool:
  try:
    _CLEAR_REFS.write_text("5")
  except OSError:
    return False
  return True


def _device_peak() -> int | None:
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
  return max(peaks, default=None)
