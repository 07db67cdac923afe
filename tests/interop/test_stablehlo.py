"""Decoders as StableHLO: the program of a folder against the model it was made of."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from effjax.cli import main
from effjax.core import errors
from effjax.core import tree as tree_lib
from effjax.interop import stablehlo
from effjax.models import encoder, encoder_config
from tests.interop import programs

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
  """The folders of all models, by a process whose annotations nobody checks.

  A checked annotation `int` does not take a free dimension.
  """
  path = tmp_path_factory.mktemp("stablehlo")
  command = "import sys\nfrom tests.interop import programs\nprograms.save(sys.argv[1])"
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  subprocess.run([sys.executable, "-c", command, path], cwd=ROOT, env=env, check=True)
  return path


@pytest.fixture(scope="session")
def written(folders):
  """A tiny random model and its folder, loaded once each."""
  made = {}

  def get(name):
    if name not in made:
      model, params, specs = programs.build(name)
      made[name] = types.SimpleNamespace(
        path=folders / name,
        model=model,
        params=params,
        specs=specs,
        notes=json.loads((folders / f"{name}.json").read_text()),
        loaded=stablehlo.load(folders / name),
      )
    return made[name]

  return get


def _tokens(rows, length):
  return (
    np.random.default_rng(1)
    .integers(0, programs.VOCAB, (rows, length))
    .astype(np.int32)
  )


def _logits(model, params, tokens):
  segments = jnp.asarray(tokens >= 0, jnp.int32)
  apply = jax.jit(model.apply)
  ids = jnp.maximum(tokens, 0)
  return np.asarray(apply({"params": params}, ids, segments=segments)[0])


@pytest.mark.parametrize(("rows", "length"), [(1, 5), (3, 17)])
@pytest.mark.parametrize("name", [n for n in programs.CONFIGS if n != "eight"])
def test_logits_equal_those_of_the_model(name, rows, length, written):
  found = written(name)
  tokens = _tokens(rows, length)
  expected = _logits(found.model, found.params, tokens)
  actual = np.asarray(found.loaded(tokens))
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", ["attention", "learned", "mamba2", "moe"])
def test_padding_changes_no_logits(name, written):
  found = written(name)
  tokens = _tokens(2, 11)
  tokens[1, 6:] = -1
  expected = _logits(found.model, found.params, tokens)[tokens >= 0]
  actual = np.asarray(found.loaded(tokens))[tokens >= 0]
  assert np.abs(actual - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", programs.CONFIGS)
def test_the_manifest_says_how_to_call_it(name, written):
  found = written(name)
  said = json.loads((found.path / stablehlo.MANIFEST).read_text())
  assert said["tokens"]["shape"] == programs.CONFIGS[name][1]
  assert said["platforms"] == ["cpu", "cuda", "tpu"]
  assert said["versions"]["jax"] == jax.__version__
  fixed = [size for size in programs.CONFIGS[name][1] if size in (1, programs.MAX_LEN)]
  assert len(found.notes) == len(fixed)
  arrays = safetensors.load_file(found.path / stablehlo.PARAMS)
  assert set(arrays) == {item["name"] for item in said["arguments"]}
  leaves = jax.tree.leaves(found.params)
  for item, leaf in zip(said["arguments"], leaves, strict=True):
    assert item["shape"] == list(leaf.shape)
    assert item["dtype"] == leaf.dtype.name
    np.testing.assert_array_equal(arrays[item["name"]], leaf)
  # Weights are arguments: the program is small.
  assert (found.path / stablehlo.PROGRAM).stat().st_size < 80_000
  assert (found.path / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", programs.RTN)
def test_quantized_leaves_stay_quantized(name, written):
  found = written(name)
  arrays = safetensors.load_file(found.path / stablehlo.PARAMS)
  leaf = tree_lib.flatten(found.params)["run_0/layer_0/mlp/up"]
  np.testing.assert_array_equal(arrays["run_0/layer_0/mlp/up.codes"], leaf.codes)
  held = sum(array.nbytes for array in arrays.values())
  assert held == sum(array.nbytes for array in jax.tree.leaves(found.params))


_ALONE = """
import json, sys
import jax, numpy as np
from jax import export
from safetensors import numpy as safetensors

jax.config.update("jax_platforms", "cpu")
manifest = json.load(open("manifest.json"))
weights = safetensors.load_file("params.safetensors")
program = export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
tokens = np.load(sys.argv[1])
arguments = [weights[a["name"]] for a in manifest["arguments"]]
np.save(sys.argv[2], program.call(arguments, tokens))
assert not any(name.startswith("effjax") for name in sys.modules)
"""


def test_whoever_has_jax_runs_it(written, tmp_path):
  found = written("attention")
  tokens = _tokens(2, 7)
  files = [str(tmp_path / name) for name in ("tokens.npy", "logits.npy")]
  np.save(files[0], tokens)
  subprocess.run([sys.executable, "-c", _ALONE, *files], cwd=found.path, check=True)
  expected = _logits(found.model, found.params, tokens)
  assert np.abs(np.load(files[1]) - expected).max() <= 1e-4 * expected.std()


def test_rows_of_a_length_that_is_asked_for(written):
  found = written("eight")
  assert found.notes == []
  tokens = _tokens(2, 5)
  expected = _logits(found.model, found.params, tokens)
  actual = np.asarray(found.loaded(tokens))
  assert np.abs(actual - expected).max() <= 1e-4 * expected.std()
  with pytest.raises(errors.InputError, match="9 tokens in a row, the program takes 8"):
    found.loaded(_tokens(2, 9))


def test_learned_positions_bound_the_length(written):
  with pytest.raises(errors.InputError, match="25 tokens in a row, the program takes"):
    written("learned").loaded(_tokens(1, programs.MAX_LEN + 1))


def test_the_folder_appears_whole_or_not_at_all(written, tmp_path, monkeypatch):
  found = written("attention")

  def fail(*args):
    raise OSError("no space left on device")

  monkeypatch.setattr(stablehlo.safetensors_file, "write", fail)
  with pytest.raises(OSError, match="no space"):
    stablehlo.save(tmp_path / "out", found.model, found.params)
  assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_one_clear_line(written, tmp_path):
  found = written("learned")
  with pytest.raises(errors.InputError, match="exists already"):
    stablehlo.save(found.path, found.model, found.params)
  made = encoder.Encoder(
    encoder_config.EncoderConfig(vocab_size=9, embed_dim=8, num_layers=1)
  )
  with pytest.raises(errors.InputError, match="writes decoders.*Encoder"):
    stablehlo.save(tmp_path / "out", made, {})
  for options, message in (
    ({"platforms": ["gpu"]}, "unknown platform 'gpu'"),
    ({"length": 0}, "length=0 must be positive"),
    (
      {"length": programs.MAX_LEN + 1},
      "25 tokens in a row, the decoder has max_len=24",
    ),
  ):
    with pytest.raises(errors.InputError, match=message):
      stablehlo.save(tmp_path / "out", found.model, found.params, **options)
  assert list(tmp_path.iterdir()) == []


def test_a_damaged_folder_is_one_clear_line(written, tmp_path):
  found = written("attention")
  with pytest.raises(errors.InputError, match="no folder of this format"):
    stablehlo.load(tmp_path / "nothing")
  for file in found.path.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  arrays = safetensors.load_file(tmp_path / stablehlo.PARAMS)
  del arrays["embed/table"]
  safetensors.save_file(arrays, tmp_path / stablehlo.PARAMS)
  with pytest.raises(errors.InputError, match="embed/table is missing"):
    stablehlo.load(tmp_path)
  (tmp_path / stablehlo.PROGRAM).write_bytes(b"nothing of the kind")
  with pytest.raises(errors.InputError, match="is not the one manifest.json was made"):
    stablehlo.load(tmp_path)


def test_the_command_line_writes_one(written, tmp_path, monkeypatch, capsys):
  found = written("moe")
  run = types.SimpleNamespace(
    model=found.model,
    params=found.params,
    specs=found.specs,
    tokenizer=None,
    stage="train",
  )
  monkeypatch.setattr("effjax.recipe.api.load", lambda workdir, stage: run)
  out = tmp_path / "out"
  argv = ["export", "--workdir", "w", "--format", "stablehlo", "--out", str(out)]
  assert main.main([*argv, "--length", "8"]) == 0
  said = capsys.readouterr()
  assert said.out == f"{out}: stablehlo, stage train\n"
  assert "note: one row a call: " in said.err
  assert stablehlo.load(out)(_tokens(1, 6)).shape == (1, 6, programs.VOCAB)
  assert main.main([*argv, "--type", "int8"]) == 2
  assert "--type belongs to --format gguf or onnx" in capsys.readouterr().err
