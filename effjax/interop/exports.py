"""Writing a model in any of the formats that others read: hf, gguf, onnx, stablehlo."""

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from effjax.core import config, errors
from effjax.core import tree as tree_lib
from effjax.interop import assemble, caches
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import adapted, coded, quantized

# Endings of what each format writes; "" is a folder.
SUFFIXES = {"hf": "", "gguf": ".gguf", "onnx": ".onnx", "stablehlo": ""}
# Options that only some formats have.
ONLY = {
  "dtype": ("hf",),
  "type": ("gguf", "onnx"),
  "architecture": ("hf", "gguf"),
  "length": ("stablehlo",),
}
_DEFAULT_TYPES = {"gguf": "F16", "onnx": "fp32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
  """What is written.

  Attributes:
    format: one of SUFFIXES.
    dtype: hf: "float32", "bfloat16" or "float16"; None for that of the parameters.
    type: gguf: of the matrices, such as "Q8_0", None for "F16"; onnx: "fp32", "int4" or
      "int8", None for "fp32".
    architecture: hf, gguf: their name of what is written; None for the first that fits.
    dense: multiply out compressed weights that the format cannot hold.
    length: stablehlo: tokens of a row; None for any, where that can be traced.
  """

  format: str = "hf"
  dtype: str | None = None
  type: str | None = None
  architecture: str | None = None
  dense: bool = False
  length: int | None = None

  def __post_init__(self):
    if self.format not in SUFFIXES:
      raise errors.unknown("format", self.format, SUFFIXES)
    for option, formats in ONLY.items():
      config.require(
        getattr(self, option) is None or self.format in formats,
        f"{option} belongs to format {' or '.join(formats)}, not {self.format!r}",
      )
    if self.type is not None:
      types = importlib.import_module(f"effjax.interop.{self.format}.export").TYPES
      if self.type not in types:
        raise errors.unknown(f"type of format {self.format!r}", self.type, types)


def check(
  options: ExportOptions,
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
) -> None:
  """Raises InputError where config and leaf kinds show that it cannot be written.

  Args:
    options: see ExportOptions.
    model, specs: the model.
    params: its parameters, or their shapes.
  """
  if options.format == "hf":
    from effjax.interop.hf import architecture, weights_files

    if options.dtype is not None:
      weights_files.dtype(options.dtype)
    architecture.fitting(model.config, options.architecture)
    if not options.dense:
      # Traced: what masked parameters stand for is computed.
      plain = lambda params: assemble.require_plain(params, "a Hugging Face folder")
      jax.eval_shape(plain, params)
  elif options.format == "gguf":
    from effjax.interop.gguf import keys

    keys.fitting(model.config, options.architecture)
    _require_codes(options, params, specs, "a GGUF file", True)
  elif options.format == "onnx":
    from effjax.interop.onnx import decoder

    caches.require_float(model.config, "an ONNX file")
    decoder.check(model.config)
    integers = options.type in ("int4", "int8")
    what = f"ONNX type {options.type or _DEFAULT_TYPES['onnx']}"
    _require_codes(options, params, specs, what, integers)


def _require_codes(
  options: ExportOptions,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  what: str,
  integers: bool,
) -> None:
  """Raises InputError for a leaf that cannot even be asked for its codes.

  Which codes fit is known when they are written, and what becomes of embeddings; here
  adapters, factors and masks over them show, before anything runs.
  """
  if options.dense:
    return
  about = tree_lib.flatten(specs)
  for path, leaf in tree_lib.flatten(params).items():
    plain = not leaf_lib.is_leaf_kind(leaf) or leaf.is_array
    if plain or about[path].kind == "embedding":
      continue
    if adapted.is_adapted(leaf):
      assemble.require_merged(path, what, False)
    inner = leaf.values if options.format == "onnx" and leaf.kind == "masked" else leaf
    fits = integers and isinstance(inner, (quantized.Quantized, coded.Coded))
    config.require(
      fits,
      f"{path} is {'a mask over ' if inner is not leaf else ''}a {inner.kind} leaf, "
      f"which {what} cannot hold; write the dense weight with dense=True",
    )


def write(
  options: ExportOptions,
  path: pathlib.Path,
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  tokenizer: Any,
) -> tuple[str, list[str]]:
  """Writes a file or folder, whole or not at all.

  Args:
    options: see ExportOptions.
    path: must not exist.
    model, params, specs: the model.
    tokenizer: or None.

  Returns:
    What it was written as (an architecture, or the type of the matrices), and notes,
    one line each.

  Raises:
    InputError: the format cannot express the model.
  """
  config.require(not path.exists(), f"{path} exists already; choose another")
  args = (path, model, params, specs, tokenizer)
  if options.format == "hf":
    from effjax.interop.hf import folder

    named = {"dtype": options.dtype, "model_type": options.architecture}
    return folder.save(*args, dense=options.dense, **named), []
  if options.format == "stablehlo":
    from effjax.interop import stablehlo

    return options.format, stablehlo.save(*args, length=options.length)
  export = importlib.import_module(f"effjax.interop.{options.format}.export")
  kind = options.type or _DEFAULT_TYPES[options.format]
  named = {"architecture": options.architecture} if options.format == "gguf" else {}
  return kind, export.save(*args, type=kind, dense=options.dense, **named)
