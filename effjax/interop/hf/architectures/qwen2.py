"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

Source: Yang et al. 2024, arXiv:2407.10671; Qwen2ForCausalLM of transformers.
"""

from typing import Any

from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like


def read(fields: Fields) -> Any:
  """Our config."""
  windows = llama_like.read_windows(fields)
  return llama_like.read_dense(fields, windows, bias=True, out_bias=False)


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  return llama_like.write_dense(config) | llama_like.write_windows(config)


TECHNIQUE = architecture.Architecture(
  model_type="qwen2",
  class_name="Qwen2ForCausalLM",
  read=read,
  write=write,
  model_rules=llama_like.model_rules,
  layer_rules=llama_like.dense_rules,
)
