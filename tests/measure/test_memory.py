import numpy as np
import pytest

from effjax.measure import memory


def test_peak_falls_back_after_a_stage_and_sees_the_next():
  if memory.Peak().read() is None:
    pytest.xfail("this system cannot reset VmHWM")
  size = 200 << 20
  before = memory.Peak()
  np.ones(size, np.uint8).sum()
  during = before.read()
  after = memory.Peak().read()
  assert during - after > 0.9 * size


def test_null_where_the_peak_cannot_be_reset(monkeypatch, tmp_path):
  monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
  assert memory.Peak().read() is None
  monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
  assert memory.resident_peak() is None


class _Device:
  def __init__(self):
    self.peak = 100

  def memory_stats(self):
    return {"peak_bytes_in_use": self.peak}


def test_accelerator_counts_only_a_peak_of_its_own(monkeypatch):
  device = _Device()
  monkeypatch.setattr(memory.jax, "local_devices", lambda: [device])
  peak = memory.Peak()
  assert peak.read() is None
  device.peak = 150
  assert peak.read() == 150
