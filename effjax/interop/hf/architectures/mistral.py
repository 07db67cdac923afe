"""Mistral: Llama with a sliding window.

Source: Jiang et al. 2023, arXiv:2310.06825; MistralForCausalLM of transformers.
"""

from typing import Any

from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like


def read(fields: Fields) -> Any:
  """Our config."""
  window = fields.get("sliding_window", int, None)
  return llama_like.read_dense(fields, [window] * llama_like.num_layers(fields))


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  options = architecture.options(config, "mixer", "attention")
  return llama_like.write_dense(config) | {"sliding_window": options["window"]}


TECHNIQUE = architecture.Architecture(
  model_type="mistral",
  class_name="MistralForCausalLM",
  read=read,
  write=write,
  model_rules=llama_like.model_rules,
  layer_rules=llama_like.dense_rules,
)
