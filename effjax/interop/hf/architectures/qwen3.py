"""Qwen3: Llama with normalized queries and keys.

Source: Yang et al. 2025, arXiv:2505.09388; Qwen3ForCausalLM of transformers.
"""

from typing import Any

from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like


def attention(fields: Fields) -> dict[str, Any]:
  """Options of attention that Llama does not have."""
  return {
    "bias": fields.get("attention_bias", bool, False),
    "qk_norm": True,
    "qk_norm_eps": fields.get("rms_norm_eps", float, 1e-6),
  }


def read(fields: Fields) -> Any:
  """Our config."""
  windows = llama_like.read_windows(fields)
  return llama_like.read_dense(fields, windows, **attention(fields))


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  return llama_like.write_dense(config) | llama_like.write_windows(config)


TECHNIQUE = architecture.Architecture(
  model_type="qwen3",
  class_name="Qwen3ForCausalLM",
  read=read,
  write=write,
  model_rules=llama_like.model_rules,
  layer_rules=llama_like.dense_rules,
)
