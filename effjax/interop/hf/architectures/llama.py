"""Llama, and what was built as one: SmolLM2, TinyLlama, Llama 2 and 3.

Source: Touvron et al. 2023, arXiv:2302.13971; LlamaForCausalLM of transformers.
"""

from typing import Any

from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like


def read(fields: Fields) -> Any:
  """Our config."""
  windows = [None] * llama_like.num_layers(fields)
  bias = fields.get("attention_bias", bool, False)
  return llama_like.read_dense(fields, windows, bias=bias)


TECHNIQUE = architecture.Architecture(
  model_type="llama",
  class_name="LlamaForCausalLM",
  read=read,
  write=llama_like.write_dense,
  model_rules=llama_like.model_rules,
  layer_rules=llama_like.dense_rules,
)
