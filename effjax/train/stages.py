"""Stage folders: a model that describes itself.

    model.json      architecture, its config after structural transforms, precision
    tree.json       of every parameter: leaf kinds with versions and static metadata,
                    nesting, shapes, dtypes, spec; and what files params/ must hold
    params/         the arrays (orbax)
    tokenizer.json  if there is one

A folder appears by one rename, so one that exists is whole. What is restored is built
from `tree.json`, never from what the array store says about itself, onto any mesh.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from effjax.core import config as config_lib
from effjax.core import errors, precision
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.data import tokenizers
from effjax.models import config as model_config
from effjax.models import decoder, encoder, encoder_config
from effjax.parallel import hosts
from effjax.parallel import spread as spread_lib
from effjax.train import checkpoint, inventory
from effjax.weights import describe

FORMAT = 1
Model = decoder.Decoder | encoder.Encoder
# What model.json calls an architecture: the model, and how its config is read.
_ARCHITECTURES = {
  "decoder": (decoder.Decoder, model_config.from_dict),
  "encoder": (encoder.Encoder, encoder_config.from_dict),
}
_NAMES = {model_cls: name for name, (model_cls, _) in _ARCHITECTURES.items()}


class Stage(NamedTuple):
  """What a stage folder holds; `tokenizer` may be None."""

  model: Any
  params: dict[str, Any]
  specs: dict[str, Any]
  tokenizer: Any


def save_stage(
  path: str | os.PathLike,
  model: Model,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  tokenizer: Any = None,
) -> None:
  """Writes a stage folder, whole or not at all.

  Of several processes each writes what it holds of the parameters, and process 0 all
  the rest; all must call this, and the folder must be shared.

  Args:
    path: the folder; it must not exist.
    model: the model the parameters belong to.
    params: parameter tree with leaves of any kind, without holes.
    specs: tree of ParamSpecs of the same structure.
    tokenizer: has `save(path)`, or None.

  Raises:
    FileExistsError: there is such a folder already.
    OSError: the disk is full (ENOSPC); nothing is left behind.
  """
  checkpoint.quiet_orbax()
  path = pathlib.Path(path).absolute()
  partial = path.with_name(f".{path.name}.partial")

  def prepare() -> None:
    if path.exists():
      raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.require_space(path.parent, _named_arrays(params))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()

  hosts.told(f"make {path.name}", prepare)
  try:
    with checkpoint.disk_full_named(path):
      _write(partial, model, params, specs, tokenizer)
  except BaseException:
    if hosts.first():
      shutil.rmtree(partial, ignore_errors=True)
    raise
  hosts.told(f"finish {path.name}", lambda: os.rename(partial, path))


def load_stage(
  path: str | os.PathLike, spread: spread_lib.Spread | None = None
) -> Stage:
  """Reads a stage folder, onto any mesh.

  Args:
    path: the folder.
    spread: where the parameters go; None for one device.

  Raises:
    InputError: there is no such folder, or its parts do not fit together; the message
      names the file or the parameter.
  """
  checkpoint.quiet_orbax()
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    raise errors.InputError(f"there is no stage folder {path}")
  model = _read_model(path / "model.json")
  files, params, specs = _read_tree(path / "tree.json")
  wanted = _named_arrays(params)
  if spread is None:
    one = SingleDeviceSharding(jax.devices()[0])
    shardings = dict.fromkeys(wanted, one)
  else:
    shardings = _named_arrays(spread.params(specs, params))
  restored = _read_arrays(path / "params", files, wanted, shardings)
  filled = {
    name: jax.tree.unflatten(
      jax.tree.structure(leaf), [restored[n] for n, _ in describe.arrays(name, leaf)]
    )
    for name, leaf in tree_lib.flatten(params).items()
  }
  tokenizer = path / "tokenizer.json"
  return Stage(
    model,
    tree_lib.unflatten(filled),
    specs,
    tokenizers.load(tokenizer) if tokenizer.exists() else None,
  )


def _write(
  folder: pathlib.Path,
  model: Model,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  tokenizer: Any,
) -> None:
  flat_specs = tree_lib.flatten(specs)
  tree = {
    name: {
      "leaf": describe.describe(leaf),
      "spec": config_lib.to_dict(flat_specs[name]),
    }
    for name, leaf in tree_lib.flatten(params).items()
  }
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "params", _named_arrays(params))
  if hosts.first():
    about = {
      "format": FORMAT,
      "architecture": _NAMES[type(model)],
      "config": config_lib.to_dict(model.config),
      "precision": config_lib.to_dict(model.precision),
    }
    _write_json(folder / "model.json", about)
    files = inventory.take(folder / "params")
    _write_json(
      folder / "tree.json", {"format": FORMAT, "files": files, "params": tree}
    )
    if tokenizer is not None:
      tokenizer.save(folder / "tokenizer.json")


def _named_arrays(tree: Mapping[str, Any]) -> dict[str, Any]:
  flat = tree_lib.flatten(tree)
  return {n: a for path, leaf in flat.items() for n, a in describe.arrays(path, leaf)}


def _read_model(path: pathlib.Path) -> Model:
  about = _read_json(path)
  name = about.get("architecture")
  if not isinstance(name, str) or name not in _ARCHITECTURES:
    raise errors.InputError(
      f"{path}: architecture {name!r} is unknown; available: "
      + ", ".join(_ARCHITECTURES)
    )
  model_cls, read_config = _ARCHITECTURES[name]
  try:
    policy = config_lib.build(
      precision.PrecisionConfig, about.get("precision"), "precision"
    )
    return model_cls(read_config(about.get("config")), policy)
  except errors.InputError as error:
    raise errors.InputError(f"{path}: {error}") from None


def _read_tree(
  path: pathlib.Path,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """The inventory of the arrays' files, abstract parameters, and specs."""
  value = _read_json(path)
  files, entries = value.get("files"), value.get("params")
  if not isinstance(files, dict) or not isinstance(entries, dict):
    raise errors.InputError(f"{path} has no tables `files` and `params`")
  params, specs = {}, {}
  for name, entry in entries.items():
    where = f"{path}: {name}"
    if not isinstance(entry, dict) or not {"leaf", "spec"} <= entry.keys():
      raise errors.InputError(f"{where} has no leaf and spec")
    params[name] = describe.abstract(entry["leaf"], where)
    specs[name] = config_lib.build(specs_lib.ParamSpec, entry["spec"], where)
    if params[name] is None or tuple(params[name].shape) != specs[name].shape:
      shape = getattr(params[name], "shape", None)
      raise errors.InputError(
        f"{where} has shape {shape}, its spec says {specs[name].shape}"
      )
  return files, tree_lib.unflatten(params), tree_lib.unflatten(specs)


def _read_arrays(
  folder: pathlib.Path,
  files: Mapping[str, Any],
  wanted: Mapping[str, Any],
  shardings: Mapping[str, Any],
) -> dict[str, jax.Array]:
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      inventory.check(folder, files)
      metadata = checkpointer.metadata(folder).item_metadata
      if metadata is None:
        raise FileNotFoundError("its description of the arrays is gone or damaged")
      stored = {
        name: (tuple(a.shape), str(a.dtype)) for name, a in metadata.tree.items()
      }
      for name in sorted(wanted.keys() | stored.keys()):
        array = wanted.get(name)
        said = None if array is None else (tuple(array.shape), str(array.dtype))
        if said != stored.get(name):
          raise errors.InputError(
            f"{folder}: {name} is stored as {stored.get(name)}, tree.json says {said}"
          )
      target = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shardings[name])
        for name, a in wanted.items()
      }
      return checkpointer.restore(folder, target)
    except errors.InputError:
      raise
    except checkpoint.DAMAGED as error:
      reason = " ".join(str(error).split())[:120]
      raise errors.InputError(f"{folder} cannot be read: {reason}") from error


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise errors.InputError(f"{path} cannot be read: {error}") from None
  if not isinstance(value, dict):
    raise errors.InputError(f"{path} does not hold an object")
  if not isinstance(value.get("format"), int) or value["format"] > FORMAT:
    raise errors.InputError(
      f"{path} has format {value.get('format')!r}, this effjax reads up to {FORMAT}"
    )
  return value
