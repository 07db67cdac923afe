"""The verbs that look at a finished run or at a config."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax.cli import catalog, main
from effjax.core import registry


@pytest.fixture
def here(command, tmp_workdir, monkeypatch):
  monkeypatch.setenv("EFFJAX_CACHE", str(command.folder / "cache"))
  return tmp_workdir


def _json(capsys, *argv):
  assert main.main([*map(str, argv), "--json"]) == 0, capsys.readouterr().err
  return json.loads(capsys.readouterr().out)


def test_score_tokens_and_logits(finished, here, capsys):
  ids_BL = np.random.default_rng(0).integers(1, 257, (2, 20)).astype(np.int64)
  np.save("ids.npy", ids_BL)
  argv = ["score", "--workdir", finished, "--stage", "train", "--tokens", "ids.npy"]
  found = _json(capsys, *argv, "--logits", "logits.npy")
  logits_BLV = np.load("logits.npy")
  assert logits_BLV.dtype == np.float32
  assert logits_BLV.shape == (2, 20, 257)
  run = effjax.load(finished, "train")
  expected_BLV = run.model.apply(
    {"params": run.params}, jnp.asarray(ids_BL, jnp.int32)
  )[0]
  np.testing.assert_allclose(logits_BLV, expected_BLV, atol=1e-5)
  logp_BLV = np.asarray(jax.nn.log_softmax(expected_BLV[:, :-1]), np.float64)
  nll_BL = -np.take_along_axis(logp_BLV, ids_BL[:, 1:, None], axis=-1)[..., 0]
  assert found["num_tokens"] == 38
  # This tokenizer has one id a byte.
  assert found["num_bytes"] == 38
  assert found["loss"] == pytest.approx(nll_BL.mean(), abs=1e-5)
  expected = nll_BL.mean() / math.log(2)
  assert found["bits_per_byte"] == pytest.approx(expected, abs=1e-5)


def test_score_of_the_validation_text_is_the_row(finished, here, capsys):
  run = effjax.load(finished, "int8")
  eval_set = run.data().eval_set
  assert len(eval_set.documents) == 1, "one document, so that a file can hold it"
  pathlib.Path("text.py").write_bytes(eval_set.text)
  argv = ["score", "--workdir", finished, "--stage", "int8", "--file", "text.py"]
  found = _json(capsys, *argv)
  assert found.pop("stage") == "int8"
  words = found.pop("num_words")
  assert words == len(eval_set.text.decode().split())
  nats = found["loss"] * found["num_tokens"] / words
  assert found.pop("word_perplexity") == pytest.approx(math.exp(nats), rel=1e-6)
  assert found == pytest.approx(run.row["quality"], rel=1e-6)


def test_windows_of_a_file(finished, here, capsys):
  text = pathlib.Path("a.txt")
  text.write_text("some words of text, " * 12)
  argv = ["score", "--workdir", finished, "--stage", "train", "--file", text]
  run = effjax.load(finished, "train")
  ids = run.tokenizer.encode_documents([text.read_text()])[0].astype(np.int32)
  for context, stride in ((32, 32), (32, 8)):
    found = _json(capsys, *argv, "--context", context, "--stride", stride)
    nats, counted = 0.0, 0
    # Every window by itself, as the protocol says it: the last `new` targets count.
    for start in range(0, len(ids) - 1, stride):
      window = ids[start : start + context + 1]
      new = start + len(window) - 1 - counted
      if new <= 0:
        continue
      logits = run.model.apply({"params": run.params}, jnp.asarray(window[None, :-1]))
      logp = np.asarray(jax.nn.log_softmax(logits[0][0]), np.float64)
      nats -= logp[np.arange(len(window) - 1), window[1:]][-new:].sum()
      counted += new
    assert counted == found["num_tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(nats / counted, abs=1e-5)
    assert (found["context"], found["stride"]) == (context, stride)


def test_generate_is_reproducible_and_streams_the_prompt(finished, here, capsys):
  argv = [
    "generate",
    "--workdir",
    str(finished),
    "--prompt",
    "def ",
    "--max-tokens",
    "9",
  ]
  outputs = []
  for seed in ("1", "1", "2"):
    assert main.main([*argv, "--seed", seed]) == 0
    outputs.append(capsys.readouterr().out)
  assert outputs[0] == outputs[1] != outputs[2]
  assert all(text.startswith("def ") and text.endswith("\n") for text in outputs)
  found = _json(capsys, *argv, "--seed", "1")
  assert "def " + found["text"] + "\n" == outputs[0]
  assert found["stage"] == "int4"


def test_greedy_text_follows_the_logits(finished, here, capsys):
  argv = [
    "generate",
    "--workdir",
    finished,
    "--stage",
    "train",
    "--prompt",
    "import os",
  ]
  text = _json(capsys, *argv, "--temperature", "0", "--max-tokens", "6")["text"]
  run = effjax.load(finished, "train")
  ids = [run.tokenizer.bos_id, *run.tokenizer.encode("import os")]
  for _ in range(6):
    tokens_BL = jnp.asarray([ids], jnp.int32)
    logits_BLV = run.model.apply({"params": run.params}, tokens_BL)[0]
    ids.append(int(np.argmax(logits_BLV[0, -1])))
    if ids[-1] == run.tokenizer.bos_id:
      break
  new = ids[10:]
  assert text == run.tokenizer.decode(i for i in new if i != run.tokenizer.bos_id)


def test_show_agrees_with_what_was_measured(command, finished, here, capsys):
  found = _json(capsys, "show", "--config", command.config)
  rows = json.loads((finished / "result.json").read_text())["stages"]
  for shown, row in zip(found["stages"], rows, strict=True):
    assert shown["stage"] == row["stage"]
    assert shown["bytes_held"] == row["bytes_held"]
  assert found["num_params"] == rows[0]["num_params"]
  assert found["config"] == json.loads((finished / "config.json").read_text())
  assert main.main(["show", "--config", str(command.config)]) == 0
  assert "embed/table" in capsys.readouterr().out
  assert list(pathlib.Path().iterdir()) == []


def test_show_splits_under_fsdp(command, here, capsys):
  flags = ["--config.mesh.preset=fsdp", "--config.mesh.num_devices=8"]
  found = _json(capsys, "show", "--config", command.config, *flags)
  shardings = {p["path"]: p["sharding"] for p in found["parameters"]}
  assert "fsdp" in shardings["run_0/layer_0/mlp/up"]
  train = found["stages"][0]
  assert train["bytes_per_device"] < train["bytes_held"] / 4


def test_show_says_how_attention_runs(command, here, capsys):
  mixers = ("mla", "longformer", "bigbird", "attention", "mamba2")
  flags = [f"--config.model.pattern={mixers}", "--config.model.num_layers=5"]
  shown = _json(capsys, "show", "--config", command.config, *flags)["attention"]
  found = {entry["mixer"]: entry for entry in shown}
  assert found.keys() == set(mixers) - {"mamba2"}
  assert found["mla"]["layers"] == "0" and found["mla"]["implementation"] == "xla"
  assert "the sequence is short (64 x 64" in found["mla"]["because"]


def test_show_says_how_attention_over_split_sequences_runs(command, here, capsys):
  flags = ["--config.model.pattern=('attention',)", "--config.mesh.preset=ring"]
  (entry,) = _json(capsys, "show", "--config", command.config, *flags)["attention"]
  assert entry["implementation"] == "ring"
  assert "split over 8 devices" in entry["because"]


def test_show_says_how_experts_run_and_counts_shared_layers(command, here, capsys):
  flags = ["--config.model.num_layers=4", "--config.model.pattern=('attention',)"]
  flags += ["--config.model.mlp=moe", "--config.model.share=2"]
  found = _json(capsys, "show", "--config", command.config, *flags)
  (entry,) = found["experts"]
  assert entry["layers"] == found["attention"][0]["layers"] == "0, 1, 2, 3"
  assert (entry["dispatch"], entry["product"]) == ("dropless", "windows")
  assert "on cpu ragged_dot multiplies every row" in entry["because"]


def test_data_shows_sizes_and_samples(command, here, capsys):
  found = _json(capsys, "data", "--config", command.config, "--samples", "2")
  assert found["batch"]["tokens"] == 8 * 64
  assert len(found["samples"]) == 2
  assert found["corpus"]["tokens"]["train"] > 100_000
  assert main.main(["data", "--config", str(command.config)]) == 0
  assert found["corpus"]["hash"] in capsys.readouterr().out


def test_report_of_one_and_of_two(command, finished, here, capsys):
  rows = _json(capsys, "report", finished, "--out", "one")["stages"]
  assert [row["stage"] for row in rows] == ["train", "int8", "pruned", "tuned", "int4"]
  assert {p.name for p in pathlib.Path("one").iterdir()} == {
    "report.md",
    "report.html",
    "pareto.png",
  }
  assert main.main(["report", str(finished), "--out", "one"]) == 0
  out = capsys.readouterr().out
  assert all(row["stage"] in out for row in rows)


@pytest.mark.parametrize("suite", registry.names(catalog.BENCHES))
@pytest.mark.slow
def test_bench_runs(suite, here, capsys):
  found = _json(capsys, "bench", suite, "--quick")
  assert found["rows"]
  assert all(
    v is None or isinstance(v, str | int | float)
    for r in found["rows"]
    for v in r.values()
  )
