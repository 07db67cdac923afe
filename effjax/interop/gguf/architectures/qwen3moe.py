"""Qwen3 with a mixture of experts in every layer.

Source: LLM_ARCH_QWEN3MOE of llama.cpp, which makes the weights of a token's experts sum
to 1, whatever the model was trained with.
"""

from typing import Any

from effjax.interop.fields import Fields
from effjax.interop.gguf import keys as gguf_keys
from effjax.interop.gguf.architectures import qwen2, qwen3
from effjax.interop.hf import architecture

_NAME = "qwen3moe"
_HIDDEN = "expert_feed_forward_length"


def read(fields: Fields) -> Any:
  """Our config."""
  keys = gguf_keys.Keys(fields, _NAME)
  experts = gguf_keys.read_experts(keys, _HIDDEN)
  return gguf_keys.dense(keys, qwen3.attention(keys), **experts)


def write(config: Any) -> dict[str, Any]:
  """Their keys."""
  moe = architecture.options(config, "mlp", "moe")
  hidden = gguf_keys.hidden(config)
  values = gguf_keys.write_model(config) | gguf_keys.write_attention(config)
  values |= {
    "expert_count": moe["num_experts"],
    "expert_used_count": moe["top_k"],
    _HIDDEN: hidden,
    # Of layers without experts, which there are none of.
    "feed_forward_length": hidden,
  }
  return gguf_keys.written(_NAME, values, gguf_keys.told_of_attention(config))


TECHNIQUE = gguf_keys.architecture_of(_NAME, read, write, qwen2.layer_rules)
