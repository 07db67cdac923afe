"""Mamba: selective state spaces without an MLP.

Source: LLM_ARCH_MAMBA of llama.cpp, which knows an expansion by 2 only. It has A
itself where we have the log of -A.
"""

from typing import Any

import numpy as np

from effjax.core import errors
from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.gguf import keys as gguf_keys
from effjax.interop.gguf import names

_NAME = "mamba"
# They are unrolled; models have 4.
_MAX_TAPS = 64


def read(fields: Fields) -> Any:
  """Our config."""
  keys = gguf_keys.Keys(fields, _NAME)
  keys.refuse({"ssm.dt_b_c_rms": False})
  options = read_states(keys) | {"dt_rank": keys.get("ssm.time_step_rank", int)}
  layer = {"mixer": "mamba1", "mlp": "none", "mixer_options": options}
  return gguf_keys.decoder(keys, layer)


def read_states(keys: gguf_keys.Keys) -> dict[str, Any]:
  """Options of both kinds of Mamba.

  Raises:
    InputError: sizes that are not positive, or a convolution that is not short.
  """
  taps = keys.count("ssm.conv_kernel")
  if taps > _MAX_TAPS:
    raise errors.InputError(
      f"{keys.where}: ssm.conv_kernel is {taps}; at most {_MAX_TAPS}"
    )
  return {
    "inner_dim": keys.count("ssm.inner_size"),
    "state_dim": keys.count("ssm.state_size"),
    "conv_taps": taps,
  }


def write(config: Any) -> dict[str, Any]:
  """Their keys.

  Raises:
    InputError: another expansion than llama.cpp has.
  """
  found = next((la for la in config.layers if la.mixer == "mamba1"), None)
  if found is None:
    raise errors.InputError("the model has no mixer 'mamba1'")
  options = found.build_mixer_options()
  inner = options.width(config.embed_dim)
  if inner != 2 * config.embed_dim:
    raise errors.InputError(
      f"llama.cpp's mamba has 2 x {config.embed_dim} inner channels, not {inner}"
    )
  values = write_states(config, options)
  values["ssm.time_step_rank"] = options.rank(config.embed_dim)
  return gguf_keys.written(_NAME, values, gguf_keys.told_of(config))


def write_states(config: Any, options: Any) -> dict[str, Any]:
  """Their keys of both kinds of Mamba."""
  return gguf_keys.write_model(config) | {
    "attention.head_count": 0,
    "feed_forward_length": 0,
    "ssm.inner_size": options.width(config.embed_dim),
    "ssm.state_size": options.state_dim,
    "ssm.conv_kernel": options.conv_taps,
  }


def to_log(a: np.ndarray) -> np.ndarray:
  """log(-A), rounded once.

  Raises:
    InputError: states that do not decay.
  """
  if not (a < 0).all():
    raise errors.InputError("a tensor ssm_a has entries that are not negative")
  return np.log(-a.astype(np.float64)).astype(np.float32)


def from_log(a_log: np.ndarray) -> np.ndarray:
  """A = -exp(log(-A)), rounded once."""
  return -np.exp(a_log.astype(np.float64)).astype(np.float32)


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  options = layer.build_mixer_options()
  inner, rank = options.width(config.embed_dim), options.rank(config.embed_dim)
  low = {"dt_down": rank, "b": options.state_dim, "c": options.state_dim}
  mixer = {
    **rules.fused("ssm_in.weight", {"x": inner, "z": inner}),
    **rules.fused("ssm_x.weight", low),
    "conv_x": rules.matrix("ssm_conv1d.weight"),
    "conv_x_bias": rules.same("ssm_conv1d.bias"),
    "dt_up": rules.matrix("ssm_dt.weight"),
    "dt_bias": rules.same("ssm_dt.bias"),
    "a_log": rules.Rule(name="ssm_a", transposed=True, decode=to_log, encode=from_log),
    "d": rules.same("ssm_d"),
    "out": rules.matrix("ssm_out.weight"),
  }
  return names.in_layer(
    rules.prefixed("mixer/", mixer)
    | {"mixer_norm/scale": rules.same("attn_norm.weight")}
  )


TECHNIQUE = gguf_keys.architecture_of(_NAME, read, write, layer_rules)
