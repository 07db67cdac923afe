"""The machine that lanes run on: its cores, and who else uses them."""

import os
import pathlib
import platform
import time

_STAT = pathlib.Path("/proc/stat")
_CPUINFO = pathlib.Path("/proc/cpuinfo")
# What a matrix product can make use of.
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_IDLE = (3, 4)  # columns of /proc/stat: idle, and waiting for a disk


def cores() -> tuple[int, ...]:
  """The cores this process may run on, by number."""
  if hasattr(os, "sched_getaffinity"):
    return tuple(sorted(os.sched_getaffinity(0)))
  return tuple(range(os.cpu_count() or 1))


def describe() -> str:
  """The processor's name, and what of its vector and matrix units counts here."""
  try:
    lines = [line.partition(":") for line in _CPUINFO.read_text().splitlines()]
  except OSError:
    return platform.processor() or platform.machine()
  values = {key.strip(): value.strip() for key, _, value in lines}
  flags = values.get("flags", "").split()
  found = ", ".join(name for name in _FEATURES if name in flags)
  return values.get("model name", "CPU") + (f" ({found})" if found else "")


class Others:
  """What everyone but one process takes of our cores while it runs."""

  def __init__(self):
    """Starts to watch."""
    self._busy, self._start = _busy_secs(), time.perf_counter()

  def share(self, cpu_secs: float) -> float | None:
    """Their part of the cores' time since the start, in [0, 1].

    Args:
      cpu_secs: CPU time of the process itself.

    Returns:
      The part, or None on a system that does not say.
    """
    now, wall = _busy_secs(), time.perf_counter() - self._start
    if now is None or self._busy is None:
      return None
    return min(max((now - self._busy - cpu_secs) / (wall * len(cores())), 0.0), 1.0)


def _busy_secs() -> float | None:
  """CPU time that anyone took of our cores, stolen time of the host included."""
  try:
    lines = _STAT.read_text().splitlines()
  except OSError:
    return None
  names = {f"cpu{core}" for core in cores()}
  ticks = 0
  for line in lines:
    name, *counts = line.split()
    if name in names:
      # The last two, time of guests, are in the first two already.
      ticks += sum(int(n) for k, n in enumerate(counts[:8]) if k not in _IDLE)
  return ticks / os.sysconf("SC_CLK_TCK")
