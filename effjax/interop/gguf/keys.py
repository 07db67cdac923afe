"""What the maps of GGUF have in common: names of keys and of tensors.

Source: gguf-py's constants and the loader of llama.cpp. A key of an architecture is
"<architecture>.<name>". What a file says by having a tensor, not by a key (an output
head of its own, biases, stretched rotary positions), maps read as keys that begin with
`TOLD`; they are made when a file is opened and never written.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from effjax.core import errors, registry
from effjax.interop import caches, rules
from effjax.interop.fields import Fields
from effjax.interop.gguf import names, rotary
from effjax.interop.hf import architecture
from effjax.models import config as model_config

ARCHITECTURES = "effjax.interop.gguf.architectures"
ARCHITECTURE = "general.architecture"
TOLD = "tensors."
# Not parameters: computed from keys, or checked when the file is opened.
IGNORED = (rotary.FACTORS, "*.attn_rot_embd.weight")
_EPSILON = {
  "rms": "attention.layer_norm_rms_epsilon",
  "layer": "attention.layer_norm_epsilon",
}
# The plainest first, where several can express a model.
_FIRST = ("llama", "qwen2", "qwen3")


class Keys:
  """The keys of one architecture."""

  def __init__(self, fields: Fields, name: str):
    """Wraps all keys of a file.

    Args:
      fields: the keys as they are in the file, and those that tensors tell.
      name: the architecture's.
    """
    self._fields = fields
    self._name = name
    self.where = fields.where

  def get(self, name: str, kind: type, *default: Any) -> Any:
    """The value of a key; see Fields.get."""
    return self._fields.get(f"{self._name}.{name}", kind, *default)

  def count(self, name: str) -> int:
    """The value of a key that counts something there is.

    Raises:
      InputError: it is not positive, or as `get`.
    """
    found = self.get(name, int)
    if found < 1:
      raise errors.InputError(f"{self.where}: {name} must be positive, got {found}")
    return found

  def told(self, name: str, kind: type, *default: Any) -> Any:
    """What tensors tell; see `tensors_tell`."""
    return self._fields.get(f"{TOLD}{name}", kind, *default)

  def refuse(self, allowed: Mapping[str, Any]) -> None:
    """Keys that change the function and have only some values here."""
    self._fields.refuse(**{f"{self._name}.{k}": v for k, v in allowed.items()})


def tensors_tell(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
  """Keys that follow from the names and shapes of tensors.

  Raises:
    InputError: there is no embedding of tokens.
  """
  if names.TOKENS not in tensors:
    raise errors.InputError(f"missing tensor {names.TOKENS}")
  told = {
    "vocab_size": tensors[names.TOKENS][0],
    "output": names.OUTPUT in tensors,
    "bias": "blk.0.attn_q.bias" in tensors,
    "out_bias": "blk.0.attn_output.bias" in tensors,
  }
  return {f"{TOLD}{name}": value for name, value in told.items()}


def written(
  name: str, values: Mapping[str, Any], told: Mapping[str, Any]
) -> dict[str, Any]:
  """Keys of an architecture, and what tensors will tell."""
  full = {f"{name}.{key}": value for key, value in values.items() if value is not None}
  return full | {f"{TOLD}{key}": value for key, value in told.items()}


def architecture_of(
  name: str,
  read: Callable[[Fields], Any],
  write: Callable[[Any], dict[str, Any]],
  layer_rules: Callable[[Any, Any], rules.Rules],
  model_rules: Callable[[Any], rules.Rules] | None = None,
) -> architecture.Architecture:
  """A map; see architecture.Architecture.

  Args:
    name: what `general.architecture` calls it; also the name of the map's file.
    read: our config from its keys.
    write: its keys from our config, as well as they can say it.
    layer_rules: where the parameters of a layer are.
    model_rules: where the others are; None for the usual names.
  """
  return architecture.Architecture(
    model_type=name,
    class_name="",
    read=read,
    write=write,
    model_rules=model_rules or names.usual_model_rules,
    layer_rules=layer_rules,
    ignored=IGNORED,
    tied=(),
  )


def find(name: str, where: str) -> architecture.Architecture:
  """The map of an architecture.

  Raises:
    InputError: there is none; the message lists those there are.
  """
  known = registry.names(ARCHITECTURES)
  if name not in known:
    raise errors.unknown(f"{ARCHITECTURE} in {where}", name, known)
  return registry.find(ARCHITECTURES, name)


def fitting(config: Any, name: str | None = None) -> architecture.Architecture:
  """The architecture that a model is an instance of.

  Args:
    config: of the model.
    name: which one to take; None takes the first that fits.

  Raises:
    InputError: the model has something that the architecture, or each of them, cannot
      express; the message names it.
  """
  if not isinstance(config, model_config.DecoderConfig):
    raise errors.InputError(
      f"a GGUF file is written of decoders here, not of an {type(config).__name__}"
    )
  caches.require_float(config, "a GGUF file")
  tries = registry.names(ARCHITECTURES) if name is None else (name,)
  order = sorted(tries, key=lambda n: (n not in _FIRST, n))
  lost: dict[str, list[str]] = {}
  for tried in order:
    found = find(tried, "--architecture")
    lost[tried] = architecture.what_is_lost(found, explicit(config))
    if not lost[tried]:
      return found
  far = "the model has no "
  nearest = min(lost, key=lambda n: (lost[n][0].startswith(far), len(lost[n])))
  raise errors.InputError(
    f"no architecture of llama.cpp here can express this model; the nearest is "
    f"{nearest}, which loses {'; '.join(lost[nearest][:3])}"
  )


def explicit(config: Any) -> Any:
  """The same decoder, with sizes in place of defaults, and unused numbers as they come.

  So a config that a file gives is equal to it where the function is.
  """
  if not isinstance(config, model_config.DecoderConfig):
    return config
  layers = []
  for layer in config.layers:
    options = layer.build_mixer_options()
    changes = {}
    if layer.mixer in ("mamba1", "mamba2"):
      changes["inner_dim"] = options.width(config.embed_dim)
    if layer.mixer == "mamba1":
      changes["dt_rank"] = options.rank(config.embed_dim)
      if not options.inner_norm:
        changes["norm_eps"] = type(options)().norm_eps
    if layer.mixer == "attention":
      if options.out_bias == options.bias:
        changes["out_bias"] = None
      if not options.qk_norm:
        changes["qk_norm_eps"] = type(options)().qk_norm_eps
      if options.position != "rope":
        changes["rope_theta"] = type(options)().rope_theta
    mixer = layer.mixer_options | changes
    layers.append(dataclasses.replace(layer, mixer_options=mixer))
  return dataclasses.replace(config, layers=tuple(layers))


def read_model(keys: Keys, norm: str = "rms") -> dict[str, Any]:
  """Fields of a decoder that are not those of its layers."""
  keys.refuse({"attention.causal": True, "logit_scale": (0.0, 1.0)})
  return {
    "vocab_size": keys.told("vocab_size", int),
    "embed_dim": keys.get("embedding_length", int),
    "tie_embeddings": not keys.told("output", bool),
    "max_len": keys.get("context_length", int),
    "norm": norm,
    "norm_eps": keys.get(_EPSILON[norm], float),
  }


def write_model(config: Any, norm: str = "rms") -> dict[str, Any]:
  """Their keys of the same."""
  return {
    "context_length": config.max_len,
    "embedding_length": config.embed_dim,
    "block_count": config.num_layers,
    "vocab_size": config.vocab_size,
    _EPSILON[norm]: config.norm_eps,
  }


def told_of(config: Any) -> dict[str, Any]:
  """What the tensors of a model will tell."""
  mixers = [
    layer.build_mixer_options() for layer in config.layers if layer.mixer == "attention"
  ]
  return {
    "vocab_size": config.vocab_size,
    "output": not config.tie_embeddings,
    "bias": any(options.has_bias("q") for options in mixers),
    "out_bias": any(options.has_bias("o") for options in mixers),
  }


def read_attention(keys: Keys, kinds: tuple[str, ...] = ()) -> dict[str, Any]:
  """Options of attention with rotary positions.

  Args:
    keys: of the architecture.
    kinds: of stretched positions that llama.cpp computes for it.
  """
  heads = keys.count("attention.head_count")
  head_dim = keys.get(
    "attention.key_length", int, keys.get("embedding_length", int) // heads
  )
  keys.refuse(
    {
      "attention.value_length": head_dim,
      "rope.dimension_count": head_dim,
      "attention.scale": 0.0,
      "attention.clamp_kqv": 0.0,
      "attention.max_alibi_bias": 0.0,
      "attention.sliding_window": 0,
    }
  )
  return {
    "num_heads": heads,
    "num_kv_heads": keys.get("attention.head_count_kv", int, heads),
    "head_dim": head_dim,
    **rotary.read(keys, kinds),
  }


def write_attention(config: Any) -> dict[str, Any]:
  """Their keys of the same."""
  options = architecture.options(config, "mixer", "attention")
  return {
    "attention.head_count": options["num_heads"],
    "attention.head_count_kv": options["num_kv_heads"],
    "attention.key_length": options["head_dim"],
    "attention.value_length": options["head_dim"],
    "rope.dimension_count": options["head_dim"],
    **rotary.write(options),
  }


def told_of_attention(config: Any) -> dict[str, Any]:
  """What the tensors of a model with rotary positions will tell."""
  options = architecture.options(config, "mixer", "attention")
  return told_of(config) | rotary.told(options)


def hidden(config: Any) -> int:
  """Hidden units of the first layer's MLP."""
  options = config.layers[0].build_mlp_options()
  if not hasattr(options, "width"):
    raise errors.InputError("the model has no MLP in its first layer")
  return options.width(config.embed_dim)


def dense(
  keys: Keys, attention: Mapping[str, Any], **mlp: Any
) -> model_config.DecoderConfig:
  """A decoder of equal layers of attention and a gated MLP, or experts.

  Args:
    keys: of the architecture.
    attention: options of attention.
    **mlp: options of a mixture of experts; none for a gated MLP.
  """
  layer = {
    "mixer": "attention",
    "mlp": "moe" if mlp else "swiglu",
    "mixer_options": dict(attention),
    "mlp_options": mlp or {"hidden_dim": keys.get("feed_forward_length", int)},
  }
  return decoder(keys, layer)


def decoder(
  keys: Keys, layer: Mapping[str, Any], norm: str = "rms", **more: Any
) -> model_config.DecoderConfig:
  """A decoder of equal layers.

  Args:
    keys: of the architecture.
    layer: fields of a LayerConfig.
    norm: of the stream.
    **more: fields of the decoder.
  """
  values = read_model(keys, norm) | more
  return architecture.decoder_config([layer] * keys.count("block_count"), **values)


def read_experts(keys: Keys, hidden: str) -> dict[str, Any]:
  """Options of experts chosen by softmax, whose weights sum to 1.

  Args:
    keys: of the architecture.
    hidden: key of an expert's hidden units.
  """
  keys.refuse(
    {
      "expert_shared_count": 0,
      "expert_weights_norm": True,
      "expert_weights_scale": (0.0, 1.0),
      "expert_gating_func": (0, 1),
      "expert_group_count": (0, 1),
      "leading_dense_block_count": 0,
    }
  )
  return {
    "num_experts": keys.get("expert_count", int),
    "top_k": keys.get("expert_used_count", int),
    "hidden_dim": keys.get(hidden, int),
  }


def extra_tensors(config: Any) -> dict[str, np.ndarray]:
  """Tensors that hold no parameters of the model."""
  if "attention" not in architecture.kinds(config, "mixer"):
    return {}
  return rotary.tensors(architecture.options(config, "mixer", "attention"))
