"""Rounded keys and values: written where a program can say it, else refused."""

import pytest

from effjax.core import errors
from effjax.interop.gguf import keys
from effjax.interop.hf import architecture
from effjax.interop.onnx import export
from effjax.models import config, decoder


def _config(*caches):
  options = {"head_dim": 8, "num_kv_heads": 4}
  layers = tuple(
    config.LayerConfig(mixer="attention", mixer_options=options | {"kv_cache": cache})
    for cache in caches
  )
  return config.DecoderConfig(vocab_size=64, embed_dim=32, layers=layers)


def _onnx(tmp_path):
  return lambda cfg: export.save(tmp_path / "model.onnx", decoder.Decoder(cfg), {})


def test_files_that_cannot_say_it_are_refused(tmp_path):
  for write, what in (
    (architecture.fitting, "a Hugging Face folder"),
    (keys.fitting, "a GGUF file"),
    (_onnx(tmp_path), "an ONNX file"),
  ):
    with pytest.raises(errors.InputError) as caught:
      write(_config("float", "int8"))
    assert str(caught.value) == (
      f"{what} cannot say that layer 1 keeps keys and values as int8 (kv_cache): the "
      "program that runs it has a cache of its own; export the stage before that"
    )
  assert not list(tmp_path.iterdir())
  floats = _config("float", "float")
  assert architecture.fitting(floats).model_type == "llama"
  assert keys.fitting(floats).model_type == "llama"
