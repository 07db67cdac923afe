"""Qwen3 with a mixture of experts in (some of) its layers.

Source: Yang et al. 2025, arXiv:2505.09388; Qwen3MoeForCausalLM of transformers.
"""

from typing import Any

from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like
from effjax.interop.hf.architectures import qwen3


def read(fields: Fields) -> Any:
  """Our config."""
  options = llama_like.read_attention(fields, **qwen3.attention(fields))
  attention = {"mixer": "attention", "mixer_options": options}
  dense = {"hidden_dim": fields.get("intermediate_size", int)}
  experts = {
    # Newer configs call it num_local_experts.
    "num_experts": fields.get("num_experts", int, None)
    or fields.get("num_local_experts", int),
    "top_k": fields.get("num_experts_per_tok", int),
    "hidden_dim": fields.get("moe_intermediate_size", int),
    "renormalize": fields.get("norm_topk_prob", bool, False),
  }
  fields.refuse(use_sliding_window=False)
  plain = fields.get("mlp_only_layers", list, [])
  every = fields.get("decoder_sparse_step", int, 1)
  layers = [
    attention | {"mlp": "swiglu", "mlp_options": dense}
    if k in plain or (k + 1) % every
    else attention | {"mlp": "moe", "mlp_options": experts}
    for k in range(llama_like.num_layers(fields))
  ]
  return architecture.decoder_config(layers, **llama_like.read(fields))


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  mlps = architecture.kinds(config, "mlp")
  moe = architecture.options(config, "mlp", "moe")
  dense = [k for k, mlp in enumerate(mlps) if mlp == "swiglu"]
  hidden = (
    architecture.options(config, "mlp", "swiglu")["hidden_dim"]
    if dense
    else config.embed_dim
  )
  return (
    llama_like.write(config)
    | llama_like.write_attention(config)
    | {
      "attention_bias": architecture.options(config, "mixer", "attention")["bias"],
      "intermediate_size": hidden,
      "num_experts": moe["num_experts"],
      "num_experts_per_tok": moe["top_k"],
      "moe_intermediate_size": moe["hidden_dim"],
      "norm_topk_prob": moe["renormalize"],
      "mlp_only_layers": dense,
      "decoder_sparse_step": 1,
    }
  )


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  del config
  found = llama_like.norm_rules() | llama_like.attention_rules(layer.mixer_options)
  if layer.mlp == "moe":
    found["mlp/router"] = rules.matrix("mlp.gate.weight")
    found |= llama_like.mlp_rules("mlp.experts.{e}.")
  else:
    found |= llama_like.mlp_rules()
  return llama_like.in_layer(found)


TECHNIQUE = architecture.Architecture(
  model_type="qwen3_moe",
  class_name="Qwen3MoeForCausalLM",
  read=read,
  write=write,
  model_rules=llama_like.model_rules,
  layer_rules=layer_rules,
)
