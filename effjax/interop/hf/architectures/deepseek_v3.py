"""DeepSeek-V3: latent attention, first layers dense, then sigmoid-routed experts.

Source: DeepSeek-AI 2024, arXiv:2412.19437; DeepseekV3ForCausalLM of transformers.
"""

from typing import Any

from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like, rotary


def read(fields: Fields) -> Any:
  """Our config."""
  fields.refuse(attention_bias=False, topk_method="noaux_tc", scoring_func="sigmoid")
  latent = {
    "num_heads": fields.get("num_attention_heads", int),
    "head_dim": fields.get("qk_nope_head_dim", int),
    "rope_dim": fields.get("qk_rope_head_dim", int),
    "value_dim": fields.get("v_head_dim", int),
    "kv_rank": fields.get("kv_lora_rank", int),
    "q_rank": fields.get("q_lora_rank", int, None),
    "rope_interleaved": fields.get("rope_interleave", bool, True),
    # The norms of the latents have transformers' default whatever the config says.
    "norm_eps": 1e-6,
    **rotary.read(fields),
  }
  experts = {
    "router": "sigmoid",
    "num_experts": fields.get("n_routed_experts", int),
    "top_k": fields.get("num_experts_per_tok", int),
    "hidden_dim": fields.get("moe_intermediate_size", int),
    "num_shared": fields.get("n_shared_experts", int, 0),
    "renormalize": fields.get("norm_topk_prob", bool, True),
    "routed_scale": fields.get("routed_scaling_factor", float, 1.0),
    "num_groups": fields.get("n_group", int, 1),
    "top_groups": fields.get("topk_group", int, 1),
  }
  dense = {"hidden_dim": fields.get("intermediate_size", int)}
  first = fields.get("first_k_dense_replace", int, 0)
  attention = {"mixer": "mla", "mixer_options": latent}
  layers = [
    attention | {"mlp": "swiglu", "mlp_options": dense}
    if k < first
    else attention | {"mlp": "moe", "mlp_options": experts}
    for k in range(llama_like.num_layers(fields))
  ]
  return architecture.decoder_config(layers, **llama_like.read(fields))


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  latent = architecture.options(config, "mixer", "mla")
  moe = architecture.options(config, "mlp", "moe")
  dense = architecture.kinds(config, "mlp").count("swiglu")
  hidden = moe["hidden_dim"]
  if dense:
    hidden = architecture.options(config, "mlp", "swiglu")["hidden_dim"]
  return llama_like.write(config) | {
    "num_attention_heads": latent["num_heads"],
    "num_key_value_heads": latent["num_heads"],
    "qk_nope_head_dim": latent["head_dim"],
    "qk_rope_head_dim": latent["rope_dim"],
    "v_head_dim": latent["value_dim"],
    "kv_lora_rank": latent["kv_rank"],
    "q_lora_rank": latent["q_rank"],
    "rope_interleave": latent["rope_interleaved"],
    **rotary.write(latent),
    "n_routed_experts": moe["num_experts"],
    "num_experts_per_tok": moe["top_k"],
    "moe_intermediate_size": moe["hidden_dim"],
    "n_shared_experts": moe["num_shared"],
    "norm_topk_prob": moe["renormalize"],
    "routed_scaling_factor": moe["routed_scale"],
    "n_group": moe["num_groups"],
    "topk_group": moe["top_groups"],
    "first_k_dense_replace": dense,
    "intermediate_size": hidden,
    "attention_bias": False,
  }


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  del config
  found = llama_like.norm_rules() | _attention_rules(layer.build_mixer_options())
  if layer.mlp == "swiglu":
    return llama_like.in_layer(found | llama_like.mlp_rules())
  found |= {
    "mlp/router": rules.matrix("mlp.gate.weight"),
    "mlp/balance": rules.same("mlp.gate.e_score_correction_bias"),
    **llama_like.mlp_rules("mlp.experts.{e}."),
    **llama_like.mlp_rules("mlp.shared_experts.", "mlp/shared/"),
  }
  return llama_like.in_layer(found)


def _attention_rules(options: Any) -> rules.Rules:
  heads, size, value = options.num_heads, options.head_dim, options.value_dim
  down = {"kv_down": options.kv_rank, "k_rope": options.rope_dim}
  up, total = "kv_b_proj.weight", size + value
  found = {
    **rules.fused("kv_a_proj_with_mqa.weight", down),
    "kv_norm/scale": rules.same("kv_a_layernorm.weight"),
    "k_up": rules.head_rows(up, heads, 0, size, total),
    "v_up": rules.head_rows(up, heads, size, total, total),
    "o": rules.matrix("o_proj.weight"),
  }
  if options.q_rank is None:
    found["q"] = rules.matrix("q_proj.weight")
  else:
    found["q_down"] = rules.matrix("q_a_proj.weight")
    found["q_norm/scale"] = rules.same("q_a_layernorm.weight")
    found["q_up"] = rules.matrix("q_b_proj.weight")
  return {
    f"mixer/{ours}": llama_like.below("self_attn.", rule)
    for ours, rule in found.items()
  }


TECHNIQUE = architecture.Architecture(
  model_type="deepseek_v3",
  class_name="DeepseekV3ForCausalLM",
  read=read,
  write=write,
  model_rules=llama_like.model_rules,
  layer_rules=layer_rules,
)
