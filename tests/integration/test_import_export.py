"""Models that leave and come back, by the command line and inside a recipe."""

import json

import jax
import numpy as np
import pytest

import effjax
from effjax.cli import main
from effjax.core import specs as specs_lib
from effjax.interop.hf import folder
from effjax.models import encoder, encoder_config

_RECIPE = '''"""Imports a model and quantizes it."""
import ml_collections


def get_config(arg=""):
  c = ml_collections.ConfigDict()
  c.data = {
    "corpus": "text_files",
    "options": {"paths": (TEXTS,)},
    "tokenizer": "model",
    "sequence_length": 64,
    "batch_size": 8,
    "eval_bytes": 3000,
  }
  c.measure = {"latency": False, "xz_preset": 0}
  c.stages = (
    {"name": "original", "technique": "import", "options": {"source": SOURCE}},
    {"name": "int8", "technique": "rtn", "options": {"activations": "int8"}},
  )
  return c
'''


@pytest.fixture(scope="session")
def exported(finished, command):
  """The trained stage as a Hugging Face folder."""
  out = command.folder / "exported"
  argv = ["export", "--workdir", finished, "--stage", "train", "--format", "hf"]
  assert main.main([*map(str, argv), "--out", str(out)]) == 0
  return out


@pytest.fixture
def here(command, tmp_workdir, monkeypatch):
  monkeypatch.setenv("EFFJAX_CACHE", str(command.folder / "cache"))
  return tmp_workdir


def _run(capsys, *argv):
  code = main.main(list(map(str, argv)))
  return code, *capsys.readouterr()


def test_what_is_exported_and_imported_is_the_same_model(
  finished, exported, here, capsys
):
  code, out, err = _run(capsys, "import", exported, "--workdir", "back")
  assert code == 0, err
  assert "parameters" in out
  before, after = effjax.load(finished, "train"), effjax.load("back")
  text = "def main():\n  return 'ünïcode'\n"
  np.testing.assert_array_equal(
    before.tokenizer.encode_documents([text])[0],
    after.tokenizer.encode_documents([text])[0],
  )
  texts = [
    effjax.generate(run, "def ", seed=3, max_tokens=20) for run in (before, after)
  ]
  assert texts[0] == texts[1]
  argv = ["export", "--workdir", "back", "--format", "hf", "--out", "again"]
  assert _run(capsys, *argv)[0] == 0
  names = sorted(path.name for path in exported.iterdir())
  assert sorted(path.name for path in (here / "again").iterdir()) == names
  same = (here / "again" / "model.safetensors").read_bytes()
  assert same == (exported / "model.safetensors").read_bytes()


def test_a_recipe_starts_from_an_import(finished, exported, command, here, capsys):
  text = _RECIPE.replace("TEXTS", repr(str(command.folder / "texts")))
  (here / "recipe.py").write_text(text.replace("SOURCE", repr(str(exported))))
  code, _, err = _run(capsys, "run", "--config", "recipe.py", "--workdir", "run")
  assert code == 0, err
  found = json.loads((here / "run" / "result.json").read_text())["stages"]
  for row, stage in zip(found, ("train", "int8"), strict=True):
    expected = effjax.load(finished, stage).row
    assert row["quality"]["num_bytes"] == expected["quality"]["num_bytes"]
    assert row["quality"]["loss"] == pytest.approx(
      expected["quality"]["loss"], rel=1e-6
    )
    assert row["bytes_held"] == expected["bytes_held"]
  # The same command again finds everything done.
  again = _run(capsys, "run", "--config", "recipe.py", "--workdir", "run")
  assert again[0] == 0
  assert "[2/2] int8: done before" in again[2]


def test_compressed_weights_are_refused_by_name_or_multiplied_out(
  finished, here, capsys
):
  argv = ["export", "--workdir", finished, "--stage", "int8", "--format", "hf"]
  code, _, err = _run(capsys, *argv, "--out", "out")
  assert code == 2
  assert "is quantized, which a Hugging Face folder cannot hold" in err
  assert not (here / "out").exists()
  assert _run(capsys, *argv, "--dense", "--dtype", "bfloat16", "--out", "out")[0] == 0
  assert (here / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["import", "nothing", "--workdir", "w"], "nothing does not exist"),
    (["import", ".", "--workdir", "w"], "it has no config.json"),
    (["import", "SOURCE", "--workdir", "w", "--dtype", "int8"], "'int8'; available"),
    (["import", "SOURCE", "--workdir", "FINISHED"], "a run of another config"),
    (
      ["export", "--workdir", "FINISHED", "--format", "hf", "--out", "SOURCE"],
      "exists",
    ),
    (["export", "--workdir", "FINISHED", "--format", "hff", "--out", "o"], "'hf'"),
    (
      ["export", "--workdir", "FINISHED", "--stage", "train", "--format", "hf"]
      + ["--out", "o", "--architecture", "gpt2"],
      "gpt2, which loses",
    ),
    (
      ["export", "--workdir", "FINISHED", "--stage", "train", "--format", "hf"]
      + ["--out", "o", "--dtype", "int4"],
      "unknown dtype 'int4'",
    ),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(
  argv, message, finished, exported, here, capsys
):
  places = {"SOURCE": str(exported), "FINISHED": str(finished)}
  code, out, err = _run(capsys, *(places.get(arg, arg) for arg in argv))
  assert (code, out) == (2, "")
  assert message in err
  assert len(err.strip().splitlines()) == 1
  assert list(here.iterdir()) == []


def test_an_encoder_is_imported_and_exported_and_writes_no_text(here, capsys):
  cfg = encoder_config.EncoderConfig(
    vocab_size=32,
    embed_dim=16,
    num_layers=2,
    mixer_options={"attention": {"num_heads": 2, "head_dim": 8}},
    pooling="mean",
  )
  model = encoder.Encoder(cfg)
  params = model.init(jax.random.key(0), *model.example_inputs())["params"]
  folder.save(here / "bert", model, params, specs_lib.specs(model))
  assert _run(capsys, "import", "bert", "--workdir", "w")[0] == 0
  run = effjax.load("w")
  assert isinstance(run.model, encoder.Encoder)
  jax.tree.map(np.testing.assert_array_equal, run.params, dict(params))
  argv = ["export", "--workdir", "w", "--format", "hf", "--out", "again"]
  assert _run(capsys, *argv)[0] == 0
  name = "model.safetensors"
  assert (here / "again" / name).read_bytes() == (here / "bert" / name).read_bytes()
  (here / "text").write_text("some text")
  for argv, message in (
    (["generate", "--prompt", "a"], "an encoder, which writes no text"),
    (["score", "--file", "text"], "which gives texts no probability"),
    (["export", "--format", "gguf", "--out", "o"], "not of an EncoderConfig"),
  ):
    code, _, err = _run(capsys, argv[0], "--workdir", "w", *argv[1:])
    assert code == 2
    assert message in err


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_damaged_file_is_named(cut, exported, here, capsys):
  (here / "model").mkdir()
  for path in exported.iterdir():
    (here / "model" / path.name).write_bytes(path.read_bytes())
  weights = here / "model" / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:cut])
  code, _, err = _run(capsys, "import", "model", "--workdir", "w")
  assert code == 2
  assert "model.safetensors is not a safetensors file" in err
  assert not (here / "w").exists()


def test_a_pickle_is_never_loaded(exported, here, capsys):
  (here / "model").mkdir()
  config = (exported / "config.json").read_bytes()
  (here / "model" / "config.json").write_bytes(config)
  (here / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  code, _, err = _run(capsys, "import", "model", "--workdir", "w")
  assert code == 2
  assert "pytorch_model.bin is a pickle, which may run code and is never loaded" in err
