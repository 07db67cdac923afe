"""Mixtral: Mistral with a mixture of experts in every layer.

Source: Jiang et al. 2024, arXiv:2401.04088; MixtralForCausalLM of transformers.
"""

from typing import Any

from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like

_EXPERT = {"gate": "w1", "down": "w2", "up": "w3"}


def read(fields: Fields) -> Any:
  """Our config."""
  window = fields.get("sliding_window", int, None)
  layer = {
    "mixer": "attention",
    "mlp": "moe",
    "mixer_options": llama_like.read_attention(fields, window=window),
    "mlp_options": {
      "num_experts": fields.get("num_local_experts", int),
      "top_k": fields.get("num_experts_per_tok", int),
      "hidden_dim": fields.get("intermediate_size", int),
    },
  }
  return architecture.decoder_config(
    [layer] * llama_like.num_layers(fields),
    **llama_like.read(fields) | {"norm_eps": fields.get("rms_norm_eps", float, 1e-5)},
  )


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  moe = architecture.options(config, "mlp", "moe")
  return (
    llama_like.write(config)
    | llama_like.write_attention(config)
    | {
      "sliding_window": architecture.options(config, "mixer", "attention")["window"],
      "num_local_experts": moe["num_experts"],
      "num_experts_per_tok": moe["top_k"],
      "intermediate_size": moe["hidden_dim"],
    }
  )


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  del config
  moe = "block_sparse_moe."
  return llama_like.in_layer(
    llama_like.norm_rules()
    | llama_like.attention_rules(layer.mixer_options)
    | {"mlp/router": rules.matrix(f"{moe}gate.weight")}
    | {
      f"mlp/{ours}": rules.matrix(f"{moe}experts.{{e}}.{theirs}.weight")
      for ours, theirs in _EXPERT.items()
    }
  )


TECHNIQUE = architecture.Architecture(
  model_type="mixtral",
  class_name="MixtralForCausalLM",
  read=read,
  write=write,
  model_rules=llama_like.model_rules,
  layer_rules=layer_rules,
)
