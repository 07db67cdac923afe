"""A GGUF file as a model here."""

import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from effjax.core import errors
from effjax.core import specs as specs_lib
from effjax.interop import assemble, opened
from effjax.interop.fields import Fields
from effjax.interop.gguf import blocks, formats, kept, reader, rotary, tokenizer
from effjax.interop.gguf import keys as gguf_keys
from effjax.models import decoder

# Keys with one number a layer in some files.
_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")


class Tensors:
  """The tensors of a file, decoded one by one.

  Attributes:
    where: the path.
  """

  def __init__(self, file: reader.File):
    """Checks that every tensor is of a type that is decoded.

    Raises:
      InputError: one is not.
    """
    self.where = str(file.path)
    self._file = file
    for info in file.tensors.values():
      if info.type not in formats.TYPES:
        raise errors.InputError(
          f"{self.where}: tensor {info.name} is {info.type}, which is not read; "
          f"readable: {', '.join(formats.TYPES)}"
        )

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """The shape of every tensor, by name."""
    return {name: info.shape for name, info in self._file.tensors.items()}

  def read(self, name: str) -> np.ndarray:
    """The values of one whole tensor, float32."""
    info = self._file.tensors[name]
    return blocks.decode(self._file.read(name), info.type).reshape(info.shape)


def open_gguf(path: str | os.PathLike, keep_quantized: bool = False) -> opened.Opened:
  """Opens a file: everything but the weights is read, and checked.

  Weights are decoded to float32 as they are loaded, or kept as they are.

  Args:
    path: the file.
    keep_quantized: hold quantized matrices and embeddings as quantized leaves of the
      same bits. Layers are scanned together only where their types are equal.

  Raises:
    InputError: not such a file, an architecture there is no map of, keys or tensors
      that are missing or do not fit, or a tokenizer that is not read.
  """
  file = reader.open_file(path)
  source = Tensors(file)
  fields = read_fields(file, source)
  name = fields.get(gguf_keys.ARCHITECTURE, str)
  found = gguf_keys.find(name, fields.where)
  config = found.read(fields)
  model, specs, places = _placed(decoder.Decoder(config), found)
  assemble.check(places, source, found.ignored)
  load = functools.partial(assemble.read, places, source)
  abstract = functools.partial(assemble.abstract, specs)
  if keep_quantized:
    model, specs, places = _placed(model.with_runs(None), found)
    runs = kept.scanned(model, places, file)
    model, specs, places = _placed(model.with_runs(runs), found)
    load = functools.partial(kept.read, places, file, source)
    abstract = functools.partial(kept.abstract, specs, places, file)
  return opened.Opened(
    model=model,
    specs=specs,
    tokenizer=tokenizer.read(file.metadata, config.vocab_size, fields.where),
    origin={"format": "gguf", "metadata": _short(file.metadata)},
    load=load,
    abstract=abstract,
  )


def _placed(model: Any, found: Any) -> tuple[Any, Mapping[str, Any], list[Any]]:
  """A model, its specs, and where its parameters are."""
  specs = specs_lib.specs(model)
  return model, specs, assemble.places(model, specs, found.rules_of(model.config))


def read_fields(file: reader.File, source: Tensors) -> Fields:
  """The keys of a file, and what its tensors tell.

  Raises:
    InputError: a part of a file, or rotary positions that are stretched in a way that
      is not here.
  """
  where = str(file.path)
  values = {name: _plain(name, value) for name, value in file.values.items()}
  parts = values.get("split.count", 1)
  if parts > 1:
    raise errors.InputError(
      f"{where} is one of {parts} parts; join them first: llama-gguf-split --merge"
    )
  fields = Fields(values, where)
  name = fields.get(gguf_keys.ARCHITECTURE, str)
  gguf_keys.find(name, where)
  keys = gguf_keys.Keys(fields, name)
  shapes = source.shapes()
  if keys.count("block_count") > len(shapes):
    raise errors.InputError(
      f"{where}: {name}.block_count is {keys.count('block_count')}, the file has "
      f"{len(shapes)} tensors"
    )
  try:
    values |= gguf_keys.tensors_tell(shapes)
    if rotary.FACTORS in shapes:
      told = rotary.fit(source.read(rotary.FACTORS).ravel(), *rotary.hints(keys))
      values[f"{gguf_keys.TOLD}{rotary.TOLD}"] = told
  except errors.InputError as error:
    raise errors.InputError(f"{where}: {error}") from None
  return Fields(values, where)


def _plain(name: str, value: Any) -> Any:
  """A value for a config: floats as short as they can be, one number for all layers."""
  plain = value.plain
  if value.type == "float32" and math.isfinite(plain):
    # 1e-05 was meant, where the file has 9.999999747378752e-06.
    return float(str(np.float32(plain)))
  if not isinstance(plain, np.ndarray) or name.startswith(tokenizer.PREFIX):
    return plain
  one = name.partition(".")[2] in _PER_LAYER and len(set(plain.tolist())) == 1
  return plain[0].item() if one else plain.tolist()


def _short(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """The metadata without its lists, which a vocabulary is made of."""
  return {
    name: value
    for name, value in metadata.items()
    if isinstance(value, bool | int | str)
    or (isinstance(value, float) and math.isfinite(value))
  }
