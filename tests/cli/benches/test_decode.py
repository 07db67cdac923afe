"""The comparison of systems on one model: rows, and what is left out or fails."""

import sys

import pytest

from effjax.cli import main
from effjax.cli.benches import decode
from effjax.cli.peers import model_files

# Largest differences of logits in standard deviations, by bits of the format.
_LIMITS = {
  "float32": 0.01,
  "F32": 0.01,
  "bfloat16": 0.3,
  "BF16": 0.3,
  "int4": 4,
  "Q4_0": 4,
}
_BATCH = 2


@pytest.fixture
def lanes(monkeypatch):
  """Leaves only some lanes."""

  def keep(*names):
    kept = tuple(lane for lane in decode.LANES if lane.name in names)
    assert len(kept) == len(names)
    monkeypatch.setattr(decode, "LANES", kept)

  return keep


@pytest.mark.oracle
def test_every_system_runs_the_same_model():
  for name in {name for lane in decode.LANES for name in lane.needs}:
    pytest.importorskip(name)
  table = decode.bench(quick=True)
  rows = {(row["system"], row["format"]): row for row in table.rows}
  assert list(rows) == [(lane.system, lane.format) for lane in decode.LANES]
  for (_, format), row in rows.items():
    assert row["batch"] == _BATCH
    assert row["prefill_tok_s"] > 0 and row["decode_tok_s"] > 0
    assert row["logits_diff"] <= _LIMITS.get(format, 1)
    assert row["peak_mb"] > max(row["prefill_mb"], row["decode_mb"]) > 0
  base = rows["effjax", "float32"]
  assert base["prefill_x"] == base["decode_x"] == base["peak_x"] == 1
  assert base["logits_diff"] == 0
  for name in ("jax ", "torch ", "onnxruntime ", "xllamacpp "):
    assert any(name in note for note in table.notes)


def test_a_system_that_is_not_installed_is_named(lanes, monkeypatch):
  lanes("effjax float32", "transformers float32", "transformers bfloat16")
  monkeypatch.setitem(sys.modules, "torch", None)
  table = decode.bench(quick=True)
  assert [row["system"] for row in table.rows] == ["effjax"]
  assert (
    "left out: transformers, as torch is not installed; pip install -e '.[bench]'"
    in table.notes
  )


def test_a_lane_that_fails_is_one_line(lanes, monkeypatch, capsys):
  lanes("effjax float32")
  monkeypatch.setattr(model_files, "write", lambda *args: [])
  assert main.main(["bench", "decode", "--quick"]) == 1
  err = capsys.readouterr().err.splitlines()[-1]
  assert err.startswith("effjax: error: effjax float32 failed: ")
  assert "there is no stage folder" in err
