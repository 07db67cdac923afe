"""What a finished run leaves behind."""

import json
import math

import numpy as np
import pytest

from effjax.core import tree
from effjax.measure import bytes as bytes_lib
from effjax.train import stages

# As DESIGN.md lists them; written out, so that a field that vanishes is noticed.
_FIELDS = {
  "stage",
  "technique",
  "after",
  "quality",
  "num_params",
  "num_nonzero",
  "bits_per_weight",
  "bytes_held",
  "bytes_on_disk",
  "flops_per_token",
  "flops_executed_per_token",
  "prefill_ms",
  "decode_ms_p50",
  "decode_ms_p90",
  "tokens_per_sec",
  "peak_memory_bytes",
  "stage_secs",
  "simulated",
  "batch",
  "prompt_tokens",
  "decode_tokens",
  "device",
  "seed",
  "corpus",
}


@pytest.fixture(scope="module")
def rows(finished):
  result = json.loads((finished / "result.json").read_text())
  return {row["stage"]: row for row in result["stages"]}


def test_folder_holds_everything(finished):
  names = {path.name for path in finished.iterdir()} - {".lock"}
  assert names == {
    "config.json",
    "overrides.txt",
    "env.json",
    "metrics.jsonl",
    "tb",
    "checkpoints",
    "profile",
    "stages",
    "report.md",
    "report.html",
    "pareto.png",
    "result.json",
  }
  assert {p.name for p in (finished / "stages").iterdir()} == {
    "1-train",
    "2-int8",
    "3-pruned",
    "4-tuned",
    "5-int4",
  }
  others = [p for p in finished.iterdir() if p.is_file() and p.name != ".lock"]
  newest = max(others, key=lambda p: p.stat().st_mtime_ns)
  assert newest.name == "result.json"


def test_rows_are_complete_and_consistent(rows):
  assert list(rows) == ["train", "int8", "pruned", "tuned", "int4"]
  for row in rows.values():
    assert row.keys() == _FIELDS
    quality = row["quality"]
    nats = quality["loss"] * quality["num_tokens"]
    expected = nats / math.log(2) / quality["num_bytes"]
    assert quality["bits_per_byte"] == pytest.approx(expected, rel=1e-12)
    assert quality["perplexity"] == pytest.approx(math.exp(quality["loss"]), rel=1e-12)
    expected = 8 * row["bytes_held"] / row["num_params"]
    assert row["bits_per_weight"] == pytest.approx(expected, rel=1e-12)
    assert row["decode_ms_p90"] >= row["decode_ms_p50"] > 0
  assert rows["train"]["after"] is None
  assert rows["tuned"]["after"] == "pruned"
  assert rows["train"]["simulated"] == rows["int8"]["simulated"] == []
  assert rows["pruned"]["simulated"] == ["bytes", "flops"]


def test_training_learned_and_compression_cost_something(rows, finished):
  losses = {name: row["quality"]["loss"] for name, row in rows.items()}
  assert losses["train"] < math.log(257) - 0.3
  assert abs(losses["int8"] - losses["train"]) < 0.01
  assert losses["pruned"] > losses["train"]
  assert losses["tuned"] < losses["pruned"]
  assert rows["int8"]["bytes_held"] < rows["train"]["bytes_held"] / 1.5


def test_rows_tell_what_the_folders_hold(rows, finished):
  for name, folder in (("int8", "2-int8"), ("int4", "5-int4")):
    stage = stages.load_stage(finished / "stages" / folder)
    assert bytes_lib.held_bytes(stage.params) == rows[name]["bytes_held"]
    stored = json.loads((finished / "stages" / folder / "row.json").read_text())
    assert stored == rows[name]


def test_fine_tuning_kept_the_zeros(finished):
  pruned, tuned = (
    tree.flatten(stages.load_stage(finished / "stages" / name).params)
    for name in ("3-pruned", "4-tuned")
  )
  masks = {p: np.asarray(x.mask()) for p, x in pruned.items() if hasattr(x, "mask")}
  assert masks
  kept = sum(int(m.sum()) for m in masks.values())
  total = sum(m.size for m in masks.values())
  assert kept == total - round(0.5 * total)
  for path, mask in masks.items():
    after = np.asarray(tuned[path].dense())
    assert not after[~mask].any()
    assert np.abs(after - np.asarray(pruned[path].dense()))[mask].any()


def test_profile_is_a_trace(finished):
  # Runs without one are compared with this run, so a trace changes no number.
  assert list((finished / "profile" / "train").rglob("*.xplane.pb"))


def test_metrics_hold_each_step_once(command, finished):
  rows = command.metrics(finished)
  steps = [(r["stage"], r["step"]) for r in rows if "loss" in r]
  expected = [("train", i) for i in range(1, 13)] + [("tuned", i) for i in range(1, 8)]
  assert steps == expected


def test_environment_and_config_are_written(finished):
  env = json.loads((finished / "env.json").read_text())
  assert env["versions"]["jax"].count(".") == 2
  assert len(env["corpus"]["hash"]) == 64
  config = json.loads((finished / "config.json").read_text())
  # Defaults are filled in.
  assert config["stages"][4]["options"]["symmetric"] is True
  assert config["stages"][1]["where"] == {
    "kind": ["matrix"],
    "path": "",
    "not_path": "",
  }
