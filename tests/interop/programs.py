"""Tiny random decoders as StableHLO, written by a process of their own."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from effjax.compress import registry
from effjax.compress.quantize import rtn
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.data import tokenizers
from effjax.interop import stablehlo
from effjax.models import config, decoder
from effjax.weights.leaves import adapted

VOCAB, WIDTH, MAX_LEN = 48, 32, 24
_HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
# A window in one of three layers: several runs.
_WINDOWS = {
  "layers": tuple(
    config.LayerConfig(mixer="attention", mixer_options=_HEADS | options)
    for options in ({}, {"window": 4}, {})
  )
}
# Fields of a config, and the dimensions of its tokens.
CONFIGS = {
  "attention": (_WINDOWS, ["b", "l"]),
  "learned": ({"position": "learned", "norm": "layer", "mlp": "gelu"}, ["b", "l"]),
  "mamba2": ({"pattern": ("mamba2", "attention")}, ["b", MAX_LEN]),
  "moe": ({"mlp": "moe"}, [1, MAX_LEN]),
  "eight": ({}, ["b", 8]),
  "kv_cache": (
    {"mixer_options": {"attention": _HEADS | {"kv_cache": "int4"}}},
    ["b", "l"],
  ),
  "int4": ({}, ["b", "l"]),
  "int8": ({}, ["b", "l"]),
  "int3": ({}, ["b", "l"]),
  "qlora": ({}, ["b", "l"]),
}
# How the matrices of some are rounded.
RTN = {
  "int4": {"bits": 4, "group": 16, "symmetric": False},
  "int8": {"activations": "int8"},
  "int3": {"bits": 3, "scale_dtype": "bfloat16"},
}


def build(name):
  """The model of a name, random parameters, and their specs."""
  fields = {"num_layers": 2, "mixer_options": {"attention": _HEADS}} | CONFIGS[name][0]
  made = config.DecoderConfig(
    vocab_size=VOCAB, embed_dim=WIDTH, max_len=MAX_LEN, **fields
  )
  model = decoder.Decoder(made)
  specs = specs_lib.specs(model)
  rng = np.random.default_rng(0)

  def one(path, spec):
    center = 1.0 if path.endswith("scale") else 0.0
    values = center + 0.1 * rng.standard_normal(spec.shape)
    return jnp.asarray(values, jnp.float32)

  params = tree_lib.map_leaves(one, specs)
  if name in RTN:
    flat = tree_lib.flatten(specs)
    paths = {path for path, spec in flat.items() if spec.kind == "matrix"}
    params = rtn.quantize(params, specs, None, paths, rtn.RTNOptions(**RTN[name]))
  if name == "qlora":
    params = registry.find("rtn")(params, specs, options={"bits": 4, "group": 16})
    params = registry.find("lora")(params, specs, options={"rank": 2})
    params = tree_lib.map_leaves(lambda _, leaf: _with_factors(leaf, rng), params)
  return model, params, specs


def _with_factors(leaf, rng):
  """An adapted leaf with numbers in the factor that starts at zero."""
  if not isinstance(leaf, adapted.Adapted):
    return leaf
  up = jnp.asarray(0.1 * rng.standard_normal(leaf.up.shape), jnp.float32)
  return dataclasses.replace(leaf, up=up)


def save(path):
  """Writes all of them to a folder, and their notes."""
  jax.config.update("jax_default_matmul_precision", "highest")
  for name in CONFIGS:
    length = 8 if name == "eight" else None
    out = pathlib.Path(path) / name
    tokenizer = tokenizers.byte_tokenizer()
    notes = stablehlo.save(out, *build(name), tokenizer, length=length)
    out.with_suffix(".json").write_text(json.dumps(notes))
