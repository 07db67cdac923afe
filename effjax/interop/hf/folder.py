"""A Hugging Face folder as a model here, and a model here as such a folder."""

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from effjax.core import errors
from effjax.core import specs as specs_lib
from effjax.data import tokenizers
from effjax.interop import assemble, opened
from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, tokenizer_files, weights_files
from effjax.models import api as models

CONFIG = "config.json"
POOLING = "1_Pooling/config.json"


def open_folder(path: str | os.PathLike) -> opened.Opened:
  """Opens a folder of config.json, safetensors and, if there is one, a tokenizer.

  Everything but the weights is read, and checked.

  Args:
    path: the folder.

  Raises:
    InputError: not such a folder, an architecture there is no map of, tensors that do
      not fit the config, or a tokenizer that does not fit the model.
  """
  path = pathlib.Path(path)
  fields = read_fields(path)
  found = architecture.find(fields.get("model_type", str), fields.where)
  config = found.read(fields)
  if getattr(config, "pooling", None) == "mean":
    _check_pooling(path / POOLING)
  source = weights_files.Tensors(path)
  source.rename(found.older)
  # An encoder's head is always tied.
  if getattr(config, "tie_embeddings", True):
    for name in found.tied:
      source.drop(name)
  model = models.build(config)
  specs = specs_lib.specs(model)
  places = assemble.places(model, specs, found.rules_of(config))
  assemble.check(places, source, found.ignored)
  return opened.Opened(
    model=model,
    specs=specs,
    tokenizer=read_tokenizer(path, config.vocab_size),
    origin={"format": "hf", "config": fields.values},
    load=functools.partial(assemble.read, places, source),
    abstract=functools.partial(assemble.abstract, specs),
  )


def read_fields(path: pathlib.Path) -> Fields:
  """The config of a folder.

  Raises:
    InputError: there is no folder, or no config in it, or it is damaged.
  """
  if not path.is_dir():
    raise errors.InputError(f"{path} is not a folder")
  file = path / CONFIG
  if not file.is_file():
    raise errors.InputError(
      f"{path} is no Hugging Face folder: it has no {CONFIG}; give the folder that "
      "holds the model's files"
    )
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise errors.InputError(f"{file} cannot be read: {error}") from None
  if not isinstance(values, dict):
    raise errors.InputError(f"{file} does not hold an object")
  return Fields(values, str(file))


def _check_pooling(file: pathlib.Path) -> None:
  """Whether sentence-transformers, if it made the folder, takes the mean, too.

  Raises:
    InputError: it pools in another way.
  """
  if not file.is_file():
    return
  fields = read_fields(file.parent)
  modes = [
    k for k, v in fields.values.items() if k.startswith("pooling_") and v is True
  ]
  if modes and modes != ["pooling_mode_mean_tokens"]:
    raise errors.InputError(
      f"{file}: {' and '.join(modes)} is not supported; effjax has "
      "pooling_mode_mean_tokens"
    )
  fields.refuse(pooling_mode="mean")


def read_tokenizer(path: pathlib.Path, vocab_size: int) -> Any:
  """The folder's tokenizer, or None.

  Raises:
    InputError: it has ids that the model has no embedding for.
  """
  if not (path / "tokenizer.json").is_file():
    return None
  tokenizer = tokenizers.from_hf_folder(path)
  if tokenizer.vocab_size > vocab_size:
    raise errors.InputError(
      f"{path / 'tokenizer.json'} has {tokenizer.vocab_size} ids, the model embeds "
      f"{vocab_size}: it is another model's tokenizer"
    )
  return tokenizer


def save(
  path: str | os.PathLike,
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  tokenizer: Any = None,
  *,
  dtype: str | None = None,
  model_type: str | None = None,
  dense: bool = False,
) -> str:
  """Writes a folder that `transformers` loads; it appears whole or not at all.

  Args:
    path: the folder; it must not exist.
    model: a Decoder or Encoder.
    params: its parameters.
    specs: tree of ParamSpecs of the same structure.
    tokenizer: written beside it, or None.
    dtype: "float32", "bfloat16" or "float16"; None keeps that of the parameters.
    model_type: the architecture to write; None takes the first that fits.
    dense: multiply out compressed weights, which the format cannot hold.

  Returns:
    The architecture's name.

  Raises:
    InputError: the folder exists, or the format cannot express the model.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise errors.InputError(f"{path} exists already; choose another --out")
  found = architecture.fitting(model.config, model_type)
  kind = None if dtype is None else weights_files.dtype(dtype)
  params = assemble.require_plain(params, "a Hugging Face folder", dense)
  places = assemble.places(model, specs, found.rules_of(model.config))
  tensors = list(assemble.foreign(places, params, kind))
  fields = found.fields(model.config) | {"torch_dtype": tensors[0].dtype.name}
  fields |= tokenizer_files.special_ids(tokenizer)
  partial = path.with_name(f".{path.name}.partial")
  path.parent.mkdir(parents=True, exist_ok=True)
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    text = json.dumps(fields, indent=2) + "\n"
    (partial / CONFIG).write_text(text, encoding="utf-8")
    weights_files.write(partial, tensors)
    for name, content in tokenizer_files.files(tokenizer).items():
      (partial / name).write_text(content, encoding="utf-8")
    partial.rename(path)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return found.model_type
