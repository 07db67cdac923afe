"""Mamba: selective state spaces without an MLP.

Source: Gu and Dao 2023, arXiv:2312.00752; MambaForCausalLM of transformers.
"""

from typing import Any

from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like

_LAYER = "backbone.layers.{k}."


def read(fields: Fields) -> Any:
  """Our config."""
  fields.refuse(hidden_act="silu", use_bias=False, use_conv_bias=True)
  width = fields.get("hidden_size", int)
  rank = fields.values.get("time_step_rank", "auto")
  layer = {
    "mixer": "mamba1",
    "mlp": "none",
    "mixer_options": {
      "inner_dim": fields.get("intermediate_size", int, 0)
      or fields.get("expand", int, 2) * width,
      "state_dim": fields.get("state_size", int, 16),
      "dt_rank": None if rank == "auto" else fields.get("time_step_rank", int),
      "conv_taps": fields.get("conv_kernel", int, 4),
    },
  }
  return architecture.decoder_config(
    [layer] * llama_like.num_layers(fields), **read_model(fields)
  )


def read_model(fields: Fields) -> dict[str, Any]:
  """Fields of a decoder that are not those of its layers."""
  return {
    "vocab_size": fields.get("vocab_size", int),
    "embed_dim": fields.get("hidden_size", int),
    "norm_eps": fields.get("layer_norm_epsilon", float, 1e-5),
    "tie_embeddings": fields.get("tie_word_embeddings", bool, True),
    # A recurrence has no longest sequence; this one bounds what is asked of it.
    "max_len": fields.get("max_position_embeddings", int, 2**20),
  }


def write_model(config: Any) -> dict[str, Any]:
  """Their fields of the same."""
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "num_hidden_layers": config.num_layers,
    "layer_norm_epsilon": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "max_position_embeddings": config.max_len,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
  }


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  options = architecture.options(config, "mixer", "mamba1")
  inner = options["inner_dim"]
  return write_model(config) | {
    "intermediate_size": inner,
    "expand": max(1, inner // config.embed_dim),
    "state_size": options["state_dim"],
    "time_step_rank": options["dt_rank"],
    "conv_kernel": options["conv_taps"],
  }


def model_rules(config: Any) -> rules.Rules:
  """Where the parameters outside of the layers are."""
  found = {
    "embed/table": rules.same("backbone.embeddings.weight"),
    "final_norm/scale": rules.same("backbone.norm_f.weight"),
  }
  if not config.tie_embeddings:
    found["head"] = rules.matrix("lm_head.weight")
  return found


def mixer_rules(config: Any, layer: Any, prefix: str) -> rules.Rules:
  """Where the parameters of a mixer are, whose tensors begin with `prefix`."""
  options = layer.build_mixer_options()
  inner, rank = options.width(config.embed_dim), options.rank(config.embed_dim)
  low = {"dt_down": rank, "b": options.state_dim, "c": options.state_dim}
  return {
    **rules.fused(f"{prefix}in_proj.weight", {"x": inner, "z": inner}),
    **rules.fused(f"{prefix}x_proj.weight", low),
    "conv_x": rules.taps(f"{prefix}conv1d.weight"),
    "conv_x_bias": rules.same(f"{prefix}conv1d.bias"),
    "dt_up": rules.matrix(f"{prefix}dt_proj.weight"),
    "dt_bias": rules.same(f"{prefix}dt_proj.bias"),
    "a_log": rules.matrix(f"{prefix}A_log"),
    "d": rules.same(f"{prefix}D"),
    "out": rules.matrix(f"{prefix}out_proj.weight"),
  }


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  return {
    "mixer_norm/scale": rules.same(f"{_LAYER}norm.weight"),
    **rules.prefixed("mixer/", mixer_rules(config, layer, f"{_LAYER}mixer.")),
  }


TECHNIQUE = architecture.Architecture(
  model_type="mamba",
  class_name="MambaForCausalLM",
  read=read,
  write=write,
  model_rules=model_rules,
  layer_rules=layer_rules,
)
