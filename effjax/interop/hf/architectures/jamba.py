"""Jamba: Mamba with attention in some layers, and experts in some.

Source: Lieber et al. 2024, arXiv:2403.19887; JambaForCausalLM of transformers.
"""

from typing import Any

from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like
from effjax.interop.hf.architectures import mamba

_NORMS = {
  "mixer_norm/scale": "input_layernorm.weight",
  "mlp_norm/scale": "pre_ff_layernorm.weight",
}
_INNER_NORMS = {"dt_down": "dt", "b": "b", "c": "c"}


def read(fields: Fields) -> Any:
  """Our config."""
  fields.refuse(hidden_act="silu", mamba_proj_bias=False, mamba_conv_bias=True)
  eps = fields.get("rms_norm_eps", float, 1e-6)
  rank = fields.values.get("mamba_dt_rank", "auto")
  mixers = {
    "attention": llama_like.read_attention(fields, position="none"),
    "mamba1": {
      "inner_dim": fields.get("mamba_expand", int) * fields.get("hidden_size", int),
      "state_dim": fields.get("mamba_d_state", int),
      "dt_rank": None if rank == "auto" else fields.get("mamba_dt_rank", int),
      "conv_taps": fields.get("mamba_d_conv", int),
      "inner_norm": True,
      "norm_eps": eps,
    },
  }
  hidden = fields.get("intermediate_size", int)
  mlps = {
    "swiglu": {"hidden_dim": hidden},
    "moe": {
      "num_experts": fields.get("num_experts", int),
      "top_k": fields.get("num_experts_per_tok", int),
      "hidden_dim": hidden,
      "renormalize": False,
    },
  }
  layers = []
  for k in range(llama_like.num_layers(fields)):
    mixer = _periodic(fields, "attn_layer", k, "attention", "mamba1")
    mlp = _periodic(fields, "expert_layer", k, "moe", "swiglu")
    if mlps["moe"]["num_experts"] == 1:
      mlp = "swiglu"
    layers.append(
      {
        "mixer": mixer,
        "mlp": mlp,
        "mixer_options": mixers[mixer],
        "mlp_options": mlps[mlp],
      }
    )
  return architecture.decoder_config(layers, **llama_like.read(fields))


def _periodic(fields: Fields, name: str, k: int, yes: str, no: str) -> str:
  period = fields.get(f"{name}_period", int)
  return yes if k % period == fields.get(f"{name}_offset", int) else no


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  mamba1 = architecture.options(config, "mixer", "mamba1")
  attention = architecture.options(config, "mixer", "attention")
  mlps = architecture.kinds(config, "mlp")
  fields = llama_like.write(config) | {
    "num_attention_heads": attention["num_heads"],
    "num_key_value_heads": attention["num_kv_heads"],
    "mamba_expand": mamba1["inner_dim"] // config.embed_dim,
    "mamba_d_state": mamba1["state_dim"],
    "mamba_dt_rank": mamba1["dt_rank"],
    "mamba_d_conv": mamba1["conv_taps"],
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    **_period("attn_layer", architecture.kinds(config, "mixer"), "attention"),
    **_period("expert_layer", mlps, "moe"),
  }
  if "moe" in mlps:
    moe = architecture.options(config, "mlp", "moe")
    return fields | {
      "intermediate_size": moe["hidden_dim"],
      "num_experts": moe["num_experts"],
      "num_experts_per_tok": moe["top_k"],
    }
  hidden = architecture.options(config, "mlp", "swiglu")["hidden_dim"]
  return fields | {"intermediate_size": hidden}


def _period(name: str, kinds: list[str], kind: str) -> dict[str, int]:
  """Period and offset of the layers of a kind; what is not periodic is lost."""
  at = [k for k, value in enumerate(kinds) if value == kind] or [0]
  period = at[1] - at[0] if len(at) > 1 else len(kinds)
  return {f"{name}_period": period, f"{name}_offset": at[0]}


def model_rules(config: Any) -> rules.Rules:
  """Where the parameters outside of the layers are."""
  found = dict(llama_like.model_rules(config))
  found["final_norm/scale"] = rules.same("model.final_layernorm.weight")
  return found


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  found = rules.named(_NORMS, rules.same)
  if layer.mixer == "attention":
    found |= llama_like.attention_rules(layer.mixer_options)
  else:
    inner = mamba.mixer_rules(config, layer, "mamba.")
    inner |= {
      f"{ours}_norm/scale": rules.same(f"mamba.{theirs}_layernorm.weight")
      for ours, theirs in _INNER_NORMS.items()
    }
    found |= rules.prefixed("mixer/", inner)
  if layer.mlp == "moe":
    found["mlp/router"] = rules.matrix("feed_forward.router.weight")
    found |= llama_like.mlp_rules("feed_forward.experts.{e}.")
  else:
    found |= llama_like.mlp_rules("feed_forward.")
  return llama_like.in_layer(found)


TECHNIQUE = architecture.Architecture(
  model_type="jamba",
  class_name="JambaForCausalLM",
  read=read,
  write=write,
  model_rules=model_rules,
  layer_rules=layer_rules,
)
