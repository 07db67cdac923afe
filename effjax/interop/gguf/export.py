"""A model here as a GGUF file that llama.cpp runs."""

import collections
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.core import errors
from effjax.core import tree as tree_lib
from effjax.interop import assemble
from effjax.interop.gguf import encode, formats, kept, tokenizer_keys, writer
from effjax.interop.gguf import keys as gguf_keys

# Types of matrices, each with its number in `general.file_type`.
TYPES = {
  "F32": 0,
  "F16": 1,
  "BF16": 32,
  "Q8_0": 7,
  "Q4_0": 2,
  "Q4_1": 3,
  "Q5_0": 8,
  "Q5_1": 9,
  "Q2_K": 10,
  "Q3_K": 11,
  "Q4_K": 14,
  "Q5_K": 16,
  "Q6_K": 18,
}
# What llama.cpp writes where a row is not whole blocks (for the first two IQ4_NL, which
# has as many bits); F16 where it is not of these.
_FALLBACK = {
  "Q2_K": "Q4_0",
  "Q3_K": "Q4_0",
  "Q4_K": "Q5_0",
  "Q5_K": "Q5_1",
  "Q6_K": "Q8_0",
}
# Small or sensitive matrices that llama.cpp keeps, and in part needs, in float32.
_KEPT = (
  "norm.weight",
  ".ffn_gate_inp.weight",
  ".ssm_conv1d.weight",
  "position_embd.weight",
)
_QUANTIZATION_VERSION = 2
_MAX_SHOWN = 3


def save(
  path: str | os.PathLike,
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  tokenizer: Any = None,
  *,
  type: str = "F16",
  dense: bool = False,
  architecture: str | None = None,
) -> list[str]:
  """Writes a file, one tensor at a time; it appears whole or not at all.

  Norms, biases, routers, convolutions and the small numbers of state-space layers are
  float32 whatever `type` says.

  Args:
    path: the file; it must not exist.
    model: a Decoder.
    params: its parameters.
    specs: tree of ParamSpecs of the same structure.
    tokenizer: written into the file, or None.
    type: of the matrices, one of TYPES.
    dense: multiply out compressed weights before they are encoded.
    architecture: llama.cpp's name of what to write; None takes the first that fits.

  Returns:
    Notes, one line each: tensors of another type than asked for, and what the file
    cannot say of the tokenizer.

  Raises:
    InputError: the file exists, the format cannot express the model, or a type cannot
      hold its values.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise errors.InputError(f"{path} exists already; choose another --out")
  if type not in TYPES:
    raise errors.unknown("type of a GGUF file", type, TYPES)
  config = model.config
  found = gguf_keys.fitting(config, architecture)
  places = assemble.places(model, specs, found.rules_of(config))
  exact, places = kept.split(places, params)
  flat = tree_lib.flatten(params)
  params = tree_lib.unflatten({place.path: flat[place.path] for place in places})
  params = assemble.require_plain(params, "an export to GGUF", dense)
  vocabulary, notes = tokenizer_keys.write(tokenizer, config.vocab_size)
  keys = found.write(gguf_keys.explicit(config)).items()
  metadata = {
    gguf_keys.ARCHITECTURE: found.model_type,
    "general.name": path.stem,
    "general.file_type": TYPES[type],
    "general.quantization_version": _QUANTIZATION_VERSION,
    **{name: value for name, value in keys if not name.startswith(gguf_keys.TOLD)},
    **vocabulary,
  }
  tensors = [
    _tensor(part, tensor_type(part.name, part.shape, type))
    for part in assemble.foreign(places, params, jnp.float32)
  ]
  notes += _exact_types(exact)
  tensors += exact
  tensors += [
    writer.Tensor(
      name=name, type="F32", shape=values.shape, raw=encode.encode(values, "F32")
    )
    for name, values in gguf_keys.extra_tensors(config).items()
  ]
  path.parent.mkdir(parents=True, exist_ok=True)
  writer.write(path, metadata, tensors)
  taken = {tensor.name for tensor in exact}
  rounded = [tensor for tensor in tensors if tensor.name not in taken]
  return _other_types(rounded, type) + notes


def tensor_type(name: str, shape: tuple[int, ...], type: str) -> str:
  """The type a tensor gets in a file of a type.

  Args:
    name: in the file.
    shape: in NumPy's order.
    type: of the file, one of TYPES.
  """
  if len(shape) < 2 or not name.endswith(".weight") or name.endswith(_KEPT):
    return "F32"
  for tried in (type, _FALLBACK.get(type)):
    if tried and shape[-1] % formats.find(tried).block_size == 0:
      return tried
  return "F16"


def _tensor(part: assemble.Foreign, type: str) -> writer.Tensor:
  """A tensor that is computed and encoded when its turn comes."""

  def raw() -> np.ndarray:
    try:
      return encode.encode(part.make(), type)
    except errors.InputError as error:
      raise errors.InputError(f"tensor {part.name}: {error}") from None

  return writer.Tensor(name=part.name, type=type, shape=part.shape, raw=raw)


def _exact_types(tensors: list[writer.Tensor]) -> list[str]:
  """A note on leaves that are written as they are."""
  if not tensors:
    return []
  counts = collections.Counter(tensor.type for tensor in tensors)
  shown = ", ".join(f"{count} {type}" for type, count in sorted(counts.items()))
  return [f"quantized leaves written as they are, bit for bit: {shown}"]


def _other_types(tensors: list[writer.Tensor], type: str) -> list[str]:
  """Notes on matrices whose rows are not whole blocks of the type asked for."""
  others: dict[tuple[str, int], list[str]] = {}
  for tensor in tensors:
    if tensor.type not in (type, "F32"):
      others.setdefault((tensor.type, tensor.shape[-1]), []).append(tensor.name)
  size = formats.find(type).block_size
  notes = []
  for (other, row), names in others.items():
    more = len(names) - _MAX_SHOWN
    shown = ", ".join(names[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
    notes.append(
      f"{other} in place of {type}, as rows of {row} are not whole blocks of {size}: "
      f"{shown}"
    )
  return notes
