"""A recipe of examples: trained twice from one start, scored by its answers."""

import json

import pytest

import effjax
from effjax.core import errors
from effjax.recipe import runner

_CONFIG = '''"""Recall of a value."""
import ml_collections


def get_config(arg=""):
  c = ml_collections.ConfigDict()
  c.data = {
    "corpus": "mqar",
    "tokenizer": "ids",
    "vocab_size": 12,
    "options": {
      "num_pairs": 1,
      "length": 4,
      "vocab_size": 12,
      "num_examples": 200,
      "num_validation": 60,
    },
    "sequence_length": 4,
    "batch_size": 16,
  }
  c.model = {
    "vocab_size": 12,
    "embed_dim": 16,
    "num_layers": 1,
    "mixer_options": {"attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 16}},
    "max_len": 8,
  }
  c.measure = {"latency": False}
  c.stages = tuple(
    {
      "name": f"rate-{rate}",
      "technique": "train",
      "after": "init",
      "options": {
        "num_steps": 60,
        "eval_every": 30,
        "optimizer": {"name": "adamw", "learning_rate": rate},
      },
    }
    for rate in (1e-9, 1e-2)
  )
  return c
'''


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("scored")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("EFFJAX_CACHE", str(folder / "cache"))
    (folder / "recipe.py").write_text(_CONFIG)
    yield runner.run(str(folder / "recipe.py"), workdir=folder / "run")


def test_rows_hold_accuracy_and_no_bits_per_byte(finished):
  result = json.loads((finished / "result.json").read_text())
  idle, trained = result["stages"]
  assert idle["after"] is trained["after"] is None
  for row in (idle, trained):
    quality = row["quality"]
    assert quality["num_tokens"] == 60 and quality["context"] == 4
    assert quality["bits_per_byte"] is quality["num_bytes"] is None
  # One value of six at first; a single pair is easily looked up.
  assert idle["quality"]["accuracy"] < 0.5
  assert trained["quality"]["accuracy"] == 1.0
  assert result["references"] == []
  assert result["corpus"]["majority"]["validation"] < 0.5
  text = (finished / "report.md").read_text()
  assert "100.00 %" in text and "not finite" not in text


def test_metrics_hold_the_accuracy_on_the_way(finished):
  lines = (finished / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  found = [row for row in rows if "eval_accuracy" in row]
  assert [row["step"] for row in found] == [30, 60, 30, 60]
  assert found[-1]["eval_accuracy"] == 1.0
  assert "eval_bits_per_byte" not in found[-1]


def test_a_loaded_run_scores_and_answers(finished, monkeypatch):
  monkeypatch.setenv("EFFJAX_CACHE", str(finished.parent / "cache"))
  run = effjax.load(finished)
  assert effjax.evaluate(run) == run.row["quality"]
  answer = effjax.generate(run, "k3 v5 k3", max_tokens=1, temperature=0.0)
  assert answer == "v5"
  with pytest.raises(errors.InputError, match="unknown symbol 'k9'"):
    effjax.generate(run, "k9", max_tokens=1)
