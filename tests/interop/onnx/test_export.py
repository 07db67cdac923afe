"""Decoders in ONNX Runtime: logits, decoding, files, errors."""

import sys
import types

import numpy as np
import pytest

from effjax.cli import main
from effjax.core import errors
from effjax.core import specs as specs_lib
from effjax.data import tokenizers
from effjax.interop.onnx import export, files
from effjax.models import config, decoder, encoder, encoder_config
from tests.interop.onnx import models

pytestmark = pytest.mark.oracle

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", models.CONFIGS)
def test_logits_equal_ours_with_right_padding(name, written):
  found = written(name)
  ids, mask = models.tokens()
  actual, _ = found.runtime(ids, mask)
  difference = np.abs(actual[mask > 0] - found.logits).max()
  assert difference <= 1e-4 * found.logits.std()


@pytest.mark.parametrize("name", models.CONFIGS)
def test_decoding_step_by_step_equals_the_whole_sequence(name, written):
  found = written(name)
  ids, whole_mask = models.tokens()
  steps = 5
  starts = np.array(models.LENGTHS) - steps
  longest = starts.max()
  # Prompts of several lengths: their padding stays in the cache, between the tokens.
  mask = (np.arange(longest) < starts[:, None]).astype(np.int64)
  result, present = found.runtime(ids[:, :longest], mask)
  expected = np.zeros((*ids.shape, models.VOCAB), np.float32)
  expected[whole_mask > 0] = found.logits
  rows = np.arange(len(ids))
  np.testing.assert_allclose(
    result[mask > 0], expected[:, :longest][mask > 0], atol=1e-4 * found.logits.std()
  )
  for step in range(steps):
    mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    result, present = found.runtime(ids[rows, starts + step][:, None], mask, present)
    np.testing.assert_allclose(
      result[:, 0],
      expected[rows, starts + step],
      atol=1e-4 * found.logits.std(),
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma"])
def test_padding_on_the_left_changes_nothing(name, written):
  found = written(name)
  ids, mask = models.tokens()
  rolled = [np.roll(ids[row], -length) for row, length in enumerate(models.LENGTHS)]
  actual, _ = found.runtime(np.stack(rolled), mask[:, ::-1].copy())
  difference = np.abs(actual[mask[:, ::-1] > 0] - found.logits).max()
  assert difference <= 1e-4 * found.logits.std()


@pytest.mark.parametrize("name", models.CONFIGS)
def test_operators_are_the_ones_that_are_listed(name, written):
  proto = onnx.load(written(name).path)
  assert {(item.domain, item.version) for item in proto.opset_import} == {("", 17)}
  assert proto.ir_version == 8
  assert {node.op_type for node in proto.graph.node} <= export.OPS
  assert all(word in export.__doc__ for word in export.OPS)


def test_inputs_and_outputs_have_the_names_of_optimum(written):
  session = written("borrowed").runtime.session
  inputs = {item.name: item.shape for item in session.get_inputs()}
  past = ["batch", 2, "past", 16]
  # Of four layers two borrow their keys.
  names = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
  assert inputs == {
    "input_ids": ["batch", "length"],
    "attention_mask": ["batch", "total"],
  } | {f"past_key_values.{name}": past for name in names}
  outputs = {item.name: item.shape for item in session.get_outputs()}
  present = ["batch", 2, "total", 16]
  assert outputs == {"logits": ["batch", "length", models.VOCAB]} | {
    f"present.{name}": present for name in names
  }


def test_without_a_cache_the_logits_are_the_same(written, tmp_path):
  found = written("mistral")
  export.save(tmp_path / "m.onnx", found.model, found.params, cache=False)
  runtime = models.Runtime(tmp_path / "m.onnx")
  ids, mask = models.tokens()
  assert [item.name for item in runtime.session.get_outputs()] == ["logits"]
  np.testing.assert_allclose(
    runtime(ids, mask)[0], found.runtime(ids, mask)[0], atol=1e-5
  )


def test_the_file_appears_whole_or_not_at_all(written, tmp_path, monkeypatch):
  found = written("llama")

  def fail(*args, **kwargs):
    raise OSError("no space left on device")

  for limit in (files.EXTERNAL_BYTES, 0):
    monkeypatch.setattr(files, "EXTERNAL_BYTES", limit)
    for name in ("save_model", "checker.check_model"):
      with monkeypatch.context() as patch:
        patch.setattr(f"onnx.{name}", fail)
        with pytest.raises(OSError, match="no space"):
          export.save(tmp_path / "m.onnx", found.model, found.params)
      assert list(tmp_path.iterdir()) == []


def test_large_weights_stand_beside_the_graph(written, tmp_path, monkeypatch):
  found = written("llama")
  monkeypatch.setattr(files, "EXTERNAL_BYTES", 1000)
  path = tmp_path / "m.onnx"
  notes = export.save(path, found.model, found.params)
  assert notes == ["the weights are in m.onnx.data: keep it beside it"]
  assert sorted(f.name for f in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
  assert path.stat().st_size < found.path.stat().st_size / 4
  ids, mask = models.tokens()
  np.testing.assert_array_equal(
    models.Runtime(path)(ids, mask)[0], found.runtime(ids, mask)[0]
  )
  path.unlink()
  with pytest.raises(errors.InputError, match="m.onnx.data exists already"):
    export.save(path, found.model, found.params)


def test_the_tokenizer_is_in_the_metadata(written, tmp_path):
  found = written("llama")
  tokenizer = tokenizers.byte_tokenizer()
  export.save(tmp_path / "m.onnx", found.model, found.params, tokenizer=tokenizer)
  session = models.Runtime(tmp_path / "m.onnx").session
  said = session.get_modelmeta().custom_metadata_map
  assert said["bos_token_id"] == str(tokenizer.bos_id)
  assert '"model"' in said["tokenizer.json"]
  assert said["effjax.type"] == "fp32"


def _decoder(**fields):
  made = config.DecoderConfig(vocab_size=48, embed_dim=32, num_layers=2, **fields)
  return decoder.Decoder(made)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"pattern": ("attention", "mamba2")},
      r"layers\[1\] has mixer='mamba2'.*available: attention",
    ),
    (
      {"mlp": "moe", "mlp_options": {"moe": {"router": "sigmoid"}}},
      r"layers\[0\] has moe router='sigmoid'.*available: top_k, switch",
    ),
  ],
)
def test_a_layer_that_cannot_be_written_is_named(fields, message, tmp_path):
  model = _decoder(**fields)
  with pytest.raises(errors.InputError, match=message) as raised:
    export.save(tmp_path / "m.onnx", model, {})
  assert "\n" not in str(raised.value)


def test_other_models_and_types_are_refused(written, tmp_path, monkeypatch):
  found = written("llama")
  path = tmp_path / "m.onnx"
  made = encoder.Encoder(
    encoder_config.EncoderConfig(vocab_size=9, embed_dim=8, num_layers=1)
  )
  with pytest.raises(errors.InputError, match="writes decoders.*Encoder"):
    export.save(path, made, {})
  with pytest.raises(errors.InputError, match="'int5'; did you mean 'int"):
    export.save(path, found.model, found.params, type="int5")
  with pytest.raises(errors.InputError, match="exists already"):
    export.save(found.path, found.model, found.params)
  monkeypatch.setitem(sys.modules, "onnx", None)
  with pytest.raises(errors.InputError, match="pip install 'effjax.onnx.'"):
    export.save(path, found.model, found.params)
  assert list(tmp_path.iterdir()) == []


def test_the_command_line_writes_one(written, tmp_path, monkeypatch, capsys):
  found = written("llama")
  run = types.SimpleNamespace(
    model=found.model,
    params=found.params,
    specs=specs_lib.specs(found.model),
    tokenizer=None,
    stage="train",
  )
  monkeypatch.setattr("effjax.recipe.api.load", lambda workdir, stage: run)
  out = tmp_path / "m.onnx"
  argv = ["export", "--workdir", "w", "--format", "onnx", "--out", str(out)]
  assert main.main([*argv, "--type", "int8"]) == 0
  said = capsys.readouterr()
  assert said.out == f"{out}: int8, stage train\n"
  assert "note: 22 matrices rounded to int8" in said.err
  ids, mask = models.tokens()
  assert models.Runtime(out)(ids, mask)[0].shape == (*ids.shape, models.VOCAB)
  out.unlink()
  assert main.main([*argv, "--dtype", "float16"]) == 2
  assert "--dtype belongs to --format hf" in capsys.readouterr().err
