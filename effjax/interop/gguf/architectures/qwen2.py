"""Qwen2 and Qwen2.5: biases on queries, keys and values.

Source: LLM_ARCH_QWEN2 of llama.cpp, which rotates halves, as here.
"""

from typing import Any

from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.gguf import keys as gguf_keys
from effjax.interop.gguf import names

_NAME = "qwen2"


def read(fields: Fields) -> Any:
  """Our config."""
  keys = gguf_keys.Keys(fields, _NAME)
  attention = gguf_keys.read_attention(keys, ("linear", "yarn"))
  return gguf_keys.dense(keys, attention | {"bias": True, "out_bias": False})


def write(config: Any) -> dict[str, Any]:
  """Their keys."""
  values = gguf_keys.write_model(config) | gguf_keys.write_attention(config)
  values["feed_forward_length"] = gguf_keys.hidden(config)
  return gguf_keys.written(_NAME, values, gguf_keys.told_of_attention(config))


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  del config
  return names.in_layer(
    names.attention_rules(layer.mixer_options, pairs=False) | names.mlp_rules(layer.mlp)
  )


TECHNIQUE = gguf_keys.architecture_of(_NAME, read, write, layer_rules)
