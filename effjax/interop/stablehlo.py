r"""A decoder's forward pass as StableHLO, with its weights in a file beside it.

A folder: `model.stablehlo` (the artifact of jax.export), `params.safetensors` (every
array as it is held: a quantized weight stays quantized), `manifest.json` (arguments in
order, with names, shapes and dtypes) and the tokenizer's files. Weights are arguments
of the program, so that it is small and serves any values of the same shapes. Whoever
has JAX runs it, without this package:

  from jax import export

  manifest = json.load(open("manifest.json"))
  weights = safetensors.numpy.load_file("params.safetensors")
  program = export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
  logits = program.call([weights[a["name"]] for a in manifest["arguments"]], tokens)

JAX promises that an artifact runs for six months of later releases of it, and three
weeks of earlier ones.

The program: `(weights, tokens int32 [b, l]) -> logits float32 [b, l, vocab]`. A token
below 0 is padding, which may only stand right of a row's tokens. Batch and length are
free where every layer can be traced so; with attention this takes its plain form, all
scores at once, head by head. Else the batch alone is free, or nothing is, and the
manifest says so.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax import export

from effjax.core import config as config_lib
from effjax.core import errors
from effjax.interop import assemble, safetensors_file
from effjax.interop.hf import tokenizer_files
from effjax.models import decoder

PROGRAM, PARAMS, MANIFEST = "model.stablehlo", "params.safetensors", "manifest.json"
PLATFORMS = ("cpu", "cuda", "tpu")
FORMAT = "effjax-stablehlo-1"
# What tracing raises where a layer asks whether a free dimension is more than a number.
_NOT_FREE = (
  TypeError,
  ValueError,
  jax.errors.JAXTypeError,
  jax.errors.InconclusiveDimensionOperation,
)


def save(
  path: str | os.PathLike,
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any] | None = None,
  tokenizer: Any = None,
  *,
  length: int | None = None,
  platforms: Sequence[str] = PLATFORMS,
) -> list[str]:
  """Writes a folder; it appears whole or not at all.

  Args:
    path: the folder; it must not exist.
    model: a Decoder.
    params: its parameters, leaves of any kind.
    specs: not needed; as every exporter is called.
    tokenizer: written beside it as a Hugging Face folder has it, or None.
    length: tokens of a row; None leaves it free, or takes the model's max_len where it
      cannot be.
    platforms: what the program can be run on.

  Returns:
    Notes, one line each: what is not free.

  Raises:
    InputError: the folder exists, the model is no decoder, an unknown platform, or a
      length that the model does not take.
  """
  del specs
  path = pathlib.Path(path)
  if path.exists():
    raise errors.InputError(f"{path} exists already; choose another --out")
  if not isinstance(model, decoder.Decoder):
    raise errors.InputError(
      f"an export to StableHLO writes decoders, not a model of {type(model).__name__}"
    )
  for platform in platforms:
    if platform not in PLATFORMS:
      raise errors.unknown("platform", platform, PLATFORMS)
  config_lib.require(
    length is None or length > 0, f"length={length} must be positive, or None for any"
  )
  arrays = _named(params)
  program, notes = _export(model, params, length, platforms)
  raw = bytes(program.serialize())
  manifest = _manifest(model, arrays, program)
  manifest["sha256"] = hashlib.sha256(raw).hexdigest()
  partial = path.with_name(f".{path.name}.partial")
  path.parent.mkdir(parents=True, exist_ok=True)
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    (partial / PROGRAM).write_bytes(raw)
    tensors = [
      assemble.Foreign(
        name, tuple(a.shape), jnp.dtype(a.dtype), lambda a=a: np.asarray(a)
      )
      for name, a in arrays.items()
    ]
    safetensors_file.write(partial / PARAMS, tensors)
    text = json.dumps(manifest, indent=2) + "\n"
    (partial / MANIFEST).write_text(text, encoding="utf-8")
    for name, content in tokenizer_files.files(tokenizer).items():
      (partial / name).write_text(content, encoding="utf-8")
    partial.rename(path)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return notes


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A program with its weights: call it with tokens.

  Attributes:
    manifest: what the folder says of itself.
  """

  manifest: dict[str, Any]
  _call: Any
  _weights: list[jax.Array]

  def __call__(self, tokens_BL: Any) -> jax.Array:
    """Logits `[B, L, V]` of the next token at every position.

    Args:
      tokens_BL: int32, below 0 at padding, right of a row's tokens.

    Raises:
      InputError: more tokens in a row than the program takes.
    """
    tokens = np.asarray(tokens_BL, np.int32)
    num_rows, num_tokens = tokens.shape
    batch, length = self.manifest["tokens"]["shape"]
    most = self.manifest["tokens"]["max_length"]
    if most is not None and num_tokens > most:
      raise errors.InputError(f"{num_tokens} tokens in a row, the program takes {most}")
    if isinstance(length, int):
      tokens = np.pad(tokens, ((0, 0), (0, length - num_tokens)), constant_values=-1)
    rows = num_rows if isinstance(batch, str) else batch
    parts = [
      self._call(self._weights, tokens[start : start + rows])[:, :num_tokens]
      for start in range(0, num_rows, rows)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def load(path: str | os.PathLike) -> Loaded:
  """The program of a folder; nothing of the model is imported or traced.

  Raises:
    InputError: not such a folder, or its files do not fit together.
  """
  path = pathlib.Path(path)
  try:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    raw = (path / PROGRAM).read_bytes()
    # Whatever is deserialized is believed: a damaged file could mean anything.
    if hashlib.sha256(raw).hexdigest() != manifest["sha256"]:
      raise errors.InputError(
        f"{path / PROGRAM} is not the one {MANIFEST} was made for"
      )
    program = export.deserialize(bytearray(raw))
    with safetensors.safe_open(path / PARAMS, framework="numpy") as file:
      held = set(file.keys())
      wanted = [argument["name"] for argument in manifest["arguments"]]
      missing = [name for name in wanted if name not in held]
      if missing:
        raise errors.InputError(f"{path / PARAMS}: {missing[0]} is missing")
      weights = [jax.device_put(file.get_tensor(name)) for name in wanted]
  except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as e:
    if isinstance(e, errors.InputError):
      raise
    reason = " ".join(str(e).split())[:160]
    raise errors.InputError(f"{path} is no folder of this format: {reason}") from None
  return Loaded(manifest, jax.jit(program.call), weights)


def _export(
  model: decoder.Decoder,
  params: Mapping[str, Any],
  length: int | None,
  platforms: Sequence[str],
) -> tuple[export.Exported, list[str]]:
  """The program with as many free dimensions as it can have; and what it has not."""
  cfg = model.config
  leaves, structure = jax.tree.flatten(params)
  shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
  fixed = cfg.max_len if length is None else length
  learned = cfg.position == "learned"
  attempts = [(("b", str(fixed)), "xla"), (("1", str(fixed)), "xla")]
  if length is None:
    attempts.insert(0, (("b", "l"), "reference"))
  reason = None
  for dims, implementation in attempts:
    written = _portable(model, implementation)

    def forward(leaves: list[jax.Array], tokens_BL: jax.Array, m=written) -> jax.Array:
      segments_BL = (tokens_BL >= 0).astype(jnp.int32)
      variables = {"params": jax.tree.unflatten(structure, leaves)}
      return m.apply(variables, jnp.maximum(tokens_BL, 0), segments=segments_BL)[0]

    bounds = [f"l <= {cfg.max_len}"] if learned and "l" in dims else []
    shape = export.symbolic_shape(", ".join(dims), constraints=bounds)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    try:
      # Kernels of one device would not run on another.
      program = export.export(jax.jit(forward), platforms=platforms)(shapes, tokens)
    except _NOT_FREE as error:
      if dims == attempts[-1][0]:
        raise
      reason = str(error).partition("\n")[0]
      continue
    return program, _notes(dims, length, reason)
  raise AssertionError("the last attempt returns or raises")


def _notes(dims: Sequence[str], length: int | None, reason: str | None) -> list[str]:
  notes = []
  if length is None and dims[1] != "l":
    notes.append(f"rows of {dims[1]} tokens, shorter ones are padded: {reason}")
  if dims[0] != "b":
    notes.append(f"one row a call: {reason}")
  return notes


def _portable(model: decoder.Decoder, implementation: str) -> decoder.Decoder:
  """The model with attention of plain operations, whatever device traces it."""

  def one(layer: Any) -> Any:
    if "implementation" not in layer.mixer_options:
      return layer
    options = layer.mixer_options | {"implementation": implementation}
    return dataclasses.replace(layer, mixer_options=options)

  runs = model.runs
  layers = tuple(one(layer) for layer in model.config.layers)
  changed = dataclasses.replace(model.config, layers=layers)
  return decoder.Decoder(changed, model.precision).with_runs(runs)


def _named(params: Mapping[str, Any]) -> dict[str, Any]:
  """Every array by the path of its parameter, and its field inside a leaf."""
  named = {}
  for path, array in jax.tree_util.tree_flatten_with_path(params)[0]:
    name = ""
    for key in path:
      if isinstance(key, jax.tree_util.DictKey):
        name += f"/{key.key}"
      else:
        name += f".{key.name}"
    if jnp.dtype(array.dtype).name not in safetensors_file.DTYPES:
      raise errors.InputError(
        f"{name[1:]} is {array.dtype}, which a safetensors file cannot hold"
      )
    named[name[1:]] = array
  return named


def _manifest(
  model: decoder.Decoder, arrays: Mapping[str, Any], program: export.Exported
) -> dict[str, Any]:
  """What is in the folder, and how to call it."""
  cfg = model.config
  shape = [d if isinstance(d, int) else str(d) for d in program.in_avals[-1].shape]
  bounded = isinstance(shape[1], str) and cfg.position == "learned"
  return {
    "format": FORMAT,
    "call": f"program.call([weights of {PARAMS} in the order of arguments], tokens)",
    "arguments": [
      {"name": name, "shape": list(array.shape), "dtype": jnp.dtype(array.dtype).name}
      for name, array in arrays.items()
    ],
    "tokens": {
      "shape": shape,
      "dtype": "int32",
      "max_length": shape[1] if isinstance(shape[1], int) else None,
      "padding": "below 0, right of the tokens of a row",
    }
    | ({"max_length": cfg.max_len} if bounded else {}),
    "output": {"shape": [*shape, cfg.vocab_size], "dtype": "float32"},
    "platforms": list(program.platforms),
    "calling_convention_version": program.calling_convention_version,
    "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
    "model": config_lib.to_dict(cfg),
  }
