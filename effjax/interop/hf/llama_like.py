"""What Llama and its relatives have in common: names of fields and of tensors.

Source: the configs and state dicts of transformers (LlamaForCausalLM and others).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, rotary
from effjax.models import config as model_config

NORMS = {
  "mixer_norm/scale": "input_layernorm.weight",
  "mlp_norm/scale": "post_attention_layernorm.weight",
}
_PREFIX = "model.layers.{k}."


def read(fields: Fields, **more: Any) -> dict[str, Any]:
  """Fields of a decoder that are not those of its layers."""
  fields.refuse(hidden_act="silu", mlp_bias=False)
  return {
    "vocab_size": fields.get("vocab_size", int),
    "embed_dim": fields.get("hidden_size", int),
    "norm_eps": fields.get("rms_norm_eps", float, 1e-6),
    "tie_embeddings": fields.get("tie_word_embeddings", bool, False),
    "max_len": fields.get("max_position_embeddings", int, 2048),
  } | more


def write(config: Any) -> dict[str, Any]:
  """Their fields of the same."""
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "num_hidden_layers": config.num_layers,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "max_position_embeddings": config.max_len,
    "hidden_act": "silu",
  }


def num_layers(fields: Fields) -> int:
  """How many layers the config says."""
  return fields.get("num_hidden_layers", int)


def read_attention(fields: Fields, **more: Any) -> dict[str, Any]:
  """Options of attention."""
  heads = fields.get("num_attention_heads", int)
  default = fields.get("hidden_size", int) // heads
  return {
    "num_heads": heads,
    "num_kv_heads": fields.get("num_key_value_heads", int, heads),
    "head_dim": fields.get("head_dim", int, default),
    **rotary.read(fields),
    **more,
  }


def write_attention(config: Any) -> dict[str, Any]:
  """Their fields of attention."""
  options = architecture.options(config, "mixer", "attention")
  return {
    "num_attention_heads": options["num_heads"],
    "num_key_value_heads": options["num_kv_heads"],
    "head_dim": options["head_dim"],
    **rotary.write(options),
  }


def model_rules(config: Any) -> rules.Rules:
  """Parameters outside of the layers."""
  found = {
    "embed/table": rules.same("model.embed_tokens.weight"),
    "final_norm/scale": rules.same("model.norm.weight"),
  }
  if not config.tie_embeddings:
    found["head"] = rules.matrix("lm_head.weight")
  return found


def in_layer(table: Mapping[str, rules.Rule]) -> rules.Rules:
  """Rules of a layer, whose tensors stand below `model.layers.<k>.`."""
  return {ours: below(_PREFIX, rule) for ours, rule in table.items()}


def below(prefix: str, rule: rules.Rule) -> rules.Rule:
  """The rule for a tensor whose name begins with `prefix`."""
  return dataclasses.replace(rule, name=prefix + rule.name)


def attention_rules(options: Mapping[str, Any]) -> rules.Rules:
  """Projections of attention, with biases and norms of heads where there are any."""
  found = {f"mixer/{n}": rules.matrix(f"self_attn.{n}_proj.weight") for n in "qkvo"}
  found |= {f"mixer/{n}_bias": rules.same(f"self_attn.{n}_proj.bias") for n in "qkvo"}
  if options["qk_norm"]:
    found |= {
      f"mixer/{n}_norm/scale": rules.same(f"self_attn.{n}_norm.weight") for n in "qk"
    }
  return found


def mlp_rules(prefix: str = "mlp.", ours: str = "mlp/") -> rules.Rules:
  """A gated MLP."""
  return {
    f"{ours}{n}": rules.matrix(f"{prefix}{n}_proj.weight")
    for n in ("gate", "up", "down")
  }


def norm_rules() -> rules.Rules:
  """Both norms of a layer."""
  return rules.named(NORMS, rules.same)


def read_windows(fields: Fields) -> list[int | None]:
  """The window of every layer, in models that may have one in some (Qwen)."""
  count = num_layers(fields)
  if not fields.get("use_sliding_window", bool, False):
    return [None] * count
  window = fields.get("sliding_window", int)
  full = fields.get("max_window_layers", int, count)
  types = fields.get(
    "layer_types",
    list,
    ["sliding_attention" if k >= full else "full_attention" for k in range(count)],
  )
  return [window if kind == "sliding_attention" else None for kind in types]


def write_windows(config: Any) -> dict[str, Any]:
  """Their fields of the same."""
  windows = [layer.mixer_options.get("window") for layer in config.layers]
  used = [window for window in windows if window is not None]
  if not used:
    return {"use_sliding_window": False, "sliding_window": None}
  return {
    "use_sliding_window": True,
    "sliding_window": used[0],
    "max_window_layers": windows.index(used[0]),
    "layer_types": [
      "full_attention" if window is None else "sliding_attention" for window in windows
    ],
  }


def read_dense(
  fields: Fields, windows: Sequence[int | None], **attention: Any
) -> model_config.DecoderConfig:
  """The config of a decoder of attention and gated MLPs.

  Args:
    fields: of config.json.
    windows: of every layer.
    **attention: options of attention beside those of `read_attention`.
  """
  options = read_attention(fields, **attention)
  mlp = {"hidden_dim": fields.get("intermediate_size", int)}
  layers = [
    {
      "mixer": "attention",
      "mlp": "swiglu",
      "mixer_options": options | {"window": window},
      "mlp_options": mlp,
    }
    for window in windows
  ]
  return architecture.decoder_config(layers, **read(fields))


def write_dense(config: Any) -> dict[str, Any]:
  """Their fields of the same, without those of windows."""
  hidden = architecture.options(config, "mlp", "swiglu")["hidden_dim"]
  return (
    write(config)
    | write_attention(config)
    | {
      "attention_bias": architecture.options(config, "mixer", "attention")["bias"],
      "intermediate_size": hidden,
    }
  )


def dense_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer of attention and a gated MLP are."""
  del config
  return in_layer(norm_rules() | attention_rules(layer.mixer_options) | mlp_rules())
