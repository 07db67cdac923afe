"""Mamba-2: state spaces with one decay a head, without an MLP.

Source: LLM_ARCH_MAMBA2 of llama.cpp. It has A itself where we have the log of -A.
"""

from typing import Any

from effjax.core import errors
from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.gguf import keys as gguf_keys
from effjax.interop.gguf import names
from effjax.interop.gguf.architectures import mamba

_NAME = "mamba2"


def read(fields: Fields) -> Any:
  """Our config."""
  keys = gguf_keys.Keys(fields, _NAME)
  options = mamba.read_states(keys)
  heads = keys.count("ssm.time_step_rank")
  if options["inner_dim"] % heads:
    raise errors.InputError(
      f"{keys.where}: ssm.time_step_rank={heads}, the heads, must divide "
      f"ssm.inner_size={options['inner_dim']}"
    )
  options |= {
    "head_dim": options["inner_dim"] // heads,
    "num_groups": keys.get("ssm.group_count", int),
    "norm_eps": keys.get("attention.layer_norm_rms_epsilon", float),
  }
  layer = {"mixer": "mamba2", "mlp": "none", "mixer_options": options}
  return gguf_keys.decoder(keys, layer)


def write(config: Any) -> dict[str, Any]:
  """Their keys.

  Raises:
    InputError: the model has no such layer.
  """
  found = next((la for la in config.layers if la.mixer == "mamba2"), None)
  if found is None:
    raise errors.InputError("the model has no mixer 'mamba2'")
  options = found.build_mixer_options()
  values = mamba.write_states(config, options) | {
    "ssm.time_step_rank": options.width(config.embed_dim) // options.head_dim,
    "ssm.group_count": options.num_groups,
  }
  return gguf_keys.written(_NAME, values, gguf_keys.told_of(config))


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  options = layer.build_mixer_options()
  inner, groups = options.width(config.embed_dim), options.num_groups
  heads = inner // options.head_dim
  shared = groups * options.state_dim
  streams = {"x": inner, "b": shared, "c": shared}
  conv = rules.fused("ssm_conv1d.weight", streams)
  bias = rules.fused("ssm_conv1d.bias", streams, transposed=False)
  mixer = {
    **rules.fused("ssm_in.weight", {"z": inner, **streams, "dt": heads}),
    **{f"conv_{name}": rule for name, rule in conv.items()},
    **{f"conv_{name}_bias": rule for name, rule in bias.items()},
    "dt_bias": rules.same("ssm_dt.bias"),
    "a_log": rules.Rule(
      name="ssm_a",
      whole=lambda shape: (*shape, 1),
      decode=mamba.to_log,
      encode=mamba.from_log,
    ),
    "d": rules.reshaped("ssm_d", (heads, 1)),
    "norm/scale": rules.reshaped("ssm_norm.weight", (groups, inner // groups)),
    "out": rules.matrix("ssm_out.weight"),
  }
  return names.in_layer(
    rules.prefixed("mixer/", mixer)
    | {"mixer_norm/scale": rules.same("attn_norm.weight")}
  )


TECHNIQUE = gguf_keys.architecture_of(_NAME, read, write, layer_rules)
