"""GPT-2: LayerNorms, learned positions, a GELU MLP, biases everywhere.

Source: LLM_ARCH_GPT2 of llama.cpp; queries, keys and values are one matrix there.
"""

from typing import Any

from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.gguf import keys as gguf_keys
from effjax.interop.gguf import names
from effjax.interop.hf import architecture

_NAME = "gpt2"


def read(fields: Fields) -> Any:
  """Our config."""
  keys = gguf_keys.Keys(fields, _NAME)
  heads = keys.count("attention.head_count")
  layer = {
    "mixer": "attention",
    "mlp": "gelu",
    "mixer_options": {
      "num_heads": heads,
      "num_kv_heads": heads,
      "head_dim": keys.get("embedding_length", int) // heads,
      "position": "none",
      "bias": True,
    },
    "mlp_options": {
      "hidden_dim": keys.get("feed_forward_length", int),
      "approximate": True,
    },
  }
  return gguf_keys.decoder(keys, layer, "layer", position="learned")


def write(config: Any) -> dict[str, Any]:
  """Their keys."""
  attention = architecture.options(config, "mixer", "attention")
  values = gguf_keys.write_model(config, "layer") | {
    "attention.head_count": attention["num_heads"],
    "feed_forward_length": architecture.options(config, "mlp", "gelu")["hidden_dim"],
  }
  return gguf_keys.written(_NAME, values, gguf_keys.told_of(config))


def model_rules(config: Any) -> rules.Rules:
  """Where the parameters outside of the layers are."""
  return names.usual_model_rules(config) | {
    "position_embed/table": rules.same("position_embd.weight"),
    "final_norm/bias": rules.same("output_norm.bias"),
  }


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  del layer
  parts = dict.fromkeys("qkv", config.embed_dim)
  bias = rules.fused("attn_qkv.bias", parts, transposed=False)
  found = {
    **rules.fused("attn_qkv.weight", parts),
    **{f"{name}_bias": rule for name, rule in bias.items()},
    "o": rules.matrix("attn_output.weight"),
    "o_bias": rules.same("attn_output.bias"),
  }
  found = rules.prefixed("mixer/", found)
  for name in ("up", "down"):
    found[f"mlp/{name}"] = rules.matrix(f"ffn_{name}.weight")
    found[f"mlp/{name}_bias"] = rules.same(f"ffn_{name}.bias")
  for ours, theirs in (("mixer_norm", "attn_norm"), ("mlp_norm", "ffn_norm")):
    found[f"{ours}/scale"] = rules.same(f"{theirs}.weight")
    found[f"{ours}/bias"] = rules.same(f"{theirs}.bias")
  return names.in_layer(found)


TECHNIQUE = gguf_keys.architecture_of(_NAME, read, write, layer_rules, model_rules)
