"""Qwen3: normalized queries and keys.

Source: LLM_ARCH_QWEN3 of llama.cpp, which rotates halves, as here.
"""

from typing import Any

from effjax.interop.fields import Fields
from effjax.interop.gguf import keys as gguf_keys
from effjax.interop.gguf.architectures import qwen2

_NAME = "qwen3"


def attention(keys: gguf_keys.Keys) -> dict[str, Any]:
  """Options of attention."""
  eps = keys.get("attention.layer_norm_rms_epsilon", float)
  return gguf_keys.read_attention(keys, ("linear", "yarn")) | {
    "qk_norm": True,
    "qk_norm_eps": eps,
  }


def read(fields: Fields) -> Any:
  """Our config."""
  keys = gguf_keys.Keys(fields, _NAME)
  return gguf_keys.dense(keys, attention(keys))


def write(config: Any) -> dict[str, Any]:
  """Their keys."""
  values = gguf_keys.write_model(config) | gguf_keys.write_attention(config)
  values["feed_forward_length"] = gguf_keys.hidden(config)
  return gguf_keys.written(_NAME, values, gguf_keys.told_of_attention(config))


TECHNIQUE = gguf_keys.architecture_of(_NAME, read, write, qwen2.layer_rules)
