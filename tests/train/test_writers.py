"""Metrics on disk and on the screen."""

import io
import struct

import pytest
from tensorboardX.proto import event_pb2

from effjax.train import console, device, writers

ROW = {
  "stage": "train",
  "step": 120,
  "loss": 3.21404,
  "grad_norm": 0.9149,
  "lr": 3e-4,
  "tokens_per_sec": 182311.4,
  "mfu": None,
  "memory_bytes": 1288490189,
}


def test_rows_are_cut_back_to_the_restored_step(tmp_path):
  path = tmp_path / "metrics.jsonl"
  for stage, steps in (("train", 5), ("tune", 4)):
    writer = writers.JsonlWriter(path, stage, 0)
    for step in range(1, steps):
      writer.write({"stage": stage, "step": step, "loss": 0.1 * step})
    writer.close()
  with path.open("a") as file:
    file.write('{"stage": "tune", "step": 4, "lo')
  writers.JsonlWriter(path, "tune", 2).close()
  found = [(row["stage"], row["step"]) for row in writers.read(path)]
  assert found == [("train", 1), ("train", 2), ("train", 3), ("train", 4)] + [
    ("tune", 1),
    ("tune", 2),
  ]
  assert writers.read(path)[3]["loss"] == 0.1 * 4
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_on_a_full_disk_stop_the_run(tmp_path):
  writer = writers.JsonlWriter(tmp_path / "metrics.jsonl", "train", 0)
  writer.close()
  writer._file = open("/dev/full", "wb", buffering=0)
  with pytest.raises(OSError, match="No space left"):
    writer.write({"step": 1})
  writer.close()


def test_numbers_that_are_not_finite_stay_json(tmp_path):
  path = tmp_path / "report.json"
  writers.write_report(path, {"metrics": {"loss": float("nan")}, "step": 3})
  assert '"loss": "nan"' in path.read_text()


def _events(path):
  """Reads a file of framed records: length, checksum, bytes, checksum."""
  data = io.BytesIO(path.read_bytes())
  while header := data.read(12):
    (length,) = struct.unpack("<Q", header[:8])
    yield event_pb2.Event.FromString(data.read(length))
    data.read(4)


def test_tensorboard_events(tmp_path):
  writer = writers.TensorBoardWriter(tmp_path / "tb", 100)
  writer.write(ROW)
  writer.close()
  (path,) = (tmp_path / "tb").glob("*tfevents*")
  first, start, event = _events(path)
  assert first.file_version == "brain.Event:2"
  assert start.step == 101
  assert start.session_log.status == event_pb2.SessionLog.START
  values = {value.tag: value.simple_value for value in event.summary.value}
  assert event.step == 120 and values["loss"] == pytest.approx(3.21404)
  assert set(values) == set(ROW) - {"stage", "step", "mfu"}


def test_the_line_for_people():
  assert console.line(ROW, 1000, 252.0) == (
    "step 120/1000 (12.0%) | loss 3.2140 | grad 0.91 | lr 3.0e-04 | "
    "182,311 tok/s | mfu n/a | mem 1.2 GiB | eta 4.2m"
  )
  known = ROW | {"mfu": 0.412, "tokens_per_sec": None, "memory_bytes": None}
  assert "| n/a tok/s | mfu 41.2% | mem n/a | eta n/a" in console.line(known, 9, None)
  assert console.duration(12.3) == "12s" and console.duration(7200.0) == "2.0h"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True)
  shown = console.Console("train", 1000)
  shown.show(ROW, 252.0)
  shown.notice("resuming [at] step 3")
  shown.close()
  captured = capsys.readouterr()
  assert captured.out == "" and "loss 3.2140" in captured.err
  assert "resuming [at] step 3" in captured.err


@pytest.mark.parametrize(
  ("kind", "tera"),
  [
    ("TPU v5 lite", 197),
    ("TPU v5p", 459),
    ("TPU v5", 459),
    ("TPU v6 lite", 918),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H200", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA A100-SXM4-40GB", 312),
    ("cpu", None),
    ("NVIDIA GeForce RTX 9999", None),
  ],
)
def test_peaks_are_stated_only_where_known(kind, tera):
  assert device.peak_flops(kind) == (tera and tera * 1e12)


def test_utilization(monkeypatch):
  assert device.model_flops_utilization(1e6, 1e7, 8) is None
  monkeypatch.setattr(device, "peak_flops", lambda kind: 1e12)
  assert device.model_flops_utilization(1e5, 1e7, 2) == 0.5
  assert device.model_flops_utilization(None, 1e7, 2) is None
  assert device.memory_bytes() > 2**20
