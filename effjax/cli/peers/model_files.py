"""One model in the files that each system reads."""

import pathlib
from collections.abc import Mapping
from typing import Any

from effjax.compress import registry as transforms
from effjax.core import precision
from effjax.core import tree as tree_lib
from effjax.interop.gguf import export as gguf_export
from effjax.interop.hf import folder as hf_folder
from effjax.interop.onnx import export as onnx_export
from effjax.models import decoder
from effjax.train import stages

DYNAMIC = "int8 dynamic"
# Formats of effjax that are quantized, with the options of `rtn`.
QUANTIZED = {
  "int8": {"bits": 8},
  DYNAMIC: {"bits": 8, "activations": "int8"},
  "int4": {"bits": 4, "group": 32},
}
# What is quantized, where a system has quantized formats.
FORMATS = {
  "effjax": "matrices and embedding (head and look-up share it); int8 has a scale an "
  "output channel, int4 one for 32 inputs; activations are float32 but in int8 dynamic",
  "onnxruntime": "matrices and head, looked-up embeddings stay float32; int8 has a "
  "scale an output and uint8 activations with one scale a call, int4 has a scale for "
  "32 inputs and float32 activations",
  "llama.cpp": "matrices and embedding (head and look-up share it), a scale for 32 "
  "inputs; activations are rounded to 8 bits in groups of 32 for Q8_0 and Q4_0",
}
_EVERYTHING = {"kind": ("matrix", "embedding")}


def write(
  system: str,
  format: str,
  path: pathlib.Path,
  model: decoder.Decoder,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
) -> list[str]:
  """Writes a model for a system.

  Args:
    system: key of WRITERS.
    format: of the weights, as the system calls it.
    path: a file or folder that does not exist.
    model: a Decoder.
    params: its float32 parameters.
    specs: tree of ParamSpecs of the same structure.

  Returns:
    Where the file is of another kind than asked for, one line each.
  """
  return WRITERS[system](format, path, model, params, specs)


def _effjax(format, path, model, params, specs) -> list[str]:
  """A stage folder, as a recipe leaves it."""
  if format in QUANTIZED:
    rtn, options = transforms.find("rtn"), QUANTIZED[format]
    params = rtn(params, specs, where=_EVERYTHING, options=options)
  else:
    model = decoder.Decoder(model.config, precision.PrecisionConfig(compute=format))
    params = tree_lib.map_leaves(lambda _, w: w.astype(format), params)
  stages.save_stage(path, model, params, specs)
  return []


def _transformers(format, path, model, params, specs) -> list[str]:
  hf_folder.save(path, model, params, specs, dtype=format)
  return []


def _onnx(format, path, model, params, specs) -> list[str]:
  type = {"float32": "fp32"}.get(format, format)
  onnx_export.save(path, model, params, specs, type=type)
  return []


def _llama(format, path, model, params, specs) -> list[str]:
  return gguf_export.save(path, model, params, specs, type=format)


WRITERS = {
  "effjax": _effjax,
  "transformers": _transformers,
  "onnxruntime": _onnx,
  "llama.cpp": _llama,
}
