"""Llama, and what llama.cpp runs as one: Mistral, Mixtral, SmolLM2, TinyLlama.

Source: LLM_ARCH_LLAMA of llama.cpp. It rotates neighbouring entries of a head, so the
rows of q and k lie in another order than here. With experts, all layers have them.
"""

from typing import Any

from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.gguf import keys as gguf_keys
from effjax.interop.gguf import names
from effjax.interop.hf import architecture

_NAME = "llama"


def read(fields: Fields) -> Any:
  """Our config."""
  keys = gguf_keys.Keys(fields, _NAME)
  attention = gguf_keys.read_attention(keys, ("linear", "yarn", "llama3"))
  bias, out_bias = (keys.told(name, bool) for name in ("bias", "out_bias"))
  attention |= {"bias": bias, "out_bias": None if bias == out_bias else out_bias}
  experts = (
    gguf_keys.read_experts(keys, "feed_forward_length")
    if keys.get("expert_count", int, 0)
    else {}
  )
  return gguf_keys.dense(keys, attention, **experts)


def write(config: Any) -> dict[str, Any]:
  """Their keys."""
  values = gguf_keys.write_model(config) | gguf_keys.write_attention(config)
  if "moe" in architecture.kinds(config, "mlp"):
    moe = architecture.options(config, "mlp", "moe")
    values |= {"expert_count": moe["num_experts"], "expert_used_count": moe["top_k"]}
  values["feed_forward_length"] = gguf_keys.hidden(config)
  return gguf_keys.written(_NAME, values, gguf_keys.told_of_attention(config))


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  del config
  return names.in_layer(
    names.attention_rules(layer.mixer_options, pairs=True) | names.mlp_rules(layer.mlp)
  )


TECHNIQUE = gguf_keys.architecture_of(_NAME, read, write, layer_rules)
