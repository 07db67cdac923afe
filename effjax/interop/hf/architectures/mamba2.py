"""Mamba-2: state spaces with one decay a head, without an MLP.

Source: Dao and Gu 2024, arXiv:2405.21060; Mamba2ForCausalLM of transformers from 5.23,
which normalizes the channels of each group apart, as mamba_ssm does.
"""

from typing import Any

from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like
from effjax.interop.hf.architectures import mamba

_LAYER = "backbone.layers.{k}."


def read(fields: Fields) -> Any:
  """Our config."""
  fields.refuse(
    hidden_act="silu",
    use_bias=False,
    use_conv_bias=True,
    rms_norm=True,
    norm_before_gate=False,
  )
  heads, head_dim = fields.get("num_heads", int), fields.get("head_dim", int)
  layer = {
    "mixer": "mamba2",
    "mlp": "none",
    "mixer_options": {
      "inner_dim": heads * head_dim,
      "head_dim": head_dim,
      "state_dim": fields.get("state_size", int),
      "num_groups": fields.get("n_groups", int),
      "conv_taps": fields.get("conv_kernel", int, 4),
      "norm_eps": fields.get("layer_norm_epsilon", float, 1e-5),
    },
  }
  return architecture.decoder_config(
    [layer] * llama_like.num_layers(fields), **mamba.read_model(fields)
  )


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  options = architecture.options(config, "mixer", "mamba2")
  inner = options["inner_dim"]
  return mamba.write_model(config) | {
    "num_heads": inner // options["head_dim"],
    "head_dim": options["head_dim"],
    "expand": max(1, inner // config.embed_dim),
    "state_size": options["state_dim"],
    "n_groups": options["num_groups"],
    "conv_kernel": options["conv_taps"],
  }


def mixer_rules(config: Any, layer: Any, prefix: str) -> rules.Rules:
  """Where the parameters of a mixer are, whose tensors begin with `prefix`."""
  options = layer.build_mixer_options()
  inner = options.width(config.embed_dim)
  groups = options.num_groups * options.state_dim
  heads = inner // options.head_dim
  streams = {"x": inner, "b": groups, "c": groups}
  found = rules.fused(f"{prefix}in_proj.weight", {"z": inner, **streams, "dt": heads})
  start, total = 0, sum(streams.values())
  for name, size in streams.items():
    stop = start + size
    found[f"conv_{name}"] = rules.taps(f"{prefix}conv1d.weight", start, total, size)
    found[f"conv_{name}_bias"] = rules.rows(
      f"{prefix}conv1d.bias", start, stop, total, transposed=False
    )
    start = stop
  return found | {
    "dt_bias": rules.same(f"{prefix}dt_bias"),
    "a_log": rules.same(f"{prefix}A_log"),
    "d": rules.same(f"{prefix}D"),
    "norm/scale": rules.same(f"{prefix}norm.weight"),
    "out": rules.matrix(f"{prefix}out_proj.weight"),
  }


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  return {
    "mixer_norm/scale": rules.same(f"{_LAYER}norm.weight"),
    **rules.prefixed("mixer/", mixer_rules(config, layer, f"{_LAYER}mixer.")),
  }


TECHNIQUE = architecture.Architecture(
  model_type="mamba2",
  class_name="Mamba2ForCausalLM",
  read=read,
  write=write,
  model_rules=mamba.model_rules,
  layer_rules=layer_rules,
)
