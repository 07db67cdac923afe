"""GPT-2: LayerNorms, learned positions, a GELU MLP, biases everywhere.

Source: Radford et al. 2019; GPT2LMHeadModel of transformers, whose matrices are
`[in, out]` and whose queries, keys and values are one matrix.
"""

from typing import Any

from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like

_LAYER = "transformer.h.{k}."


def read(fields: Fields) -> Any:
  """Our config."""
  fields.refuse(
    activation_function=("gelu_new", "gelu_pytorch_tanh"),
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False,
  )
  width, heads = fields.get("n_embd", int), fields.get("n_head", int)
  layer = {
    "mixer": "attention",
    "mlp": "gelu",
    "mixer_options": {
      "num_heads": heads,
      "num_kv_heads": heads,
      "head_dim": width // heads,
      "position": "none",
      "bias": True,
    },
    "mlp_options": {
      "hidden_dim": fields.get("n_inner", int, 4 * width),
      "approximate": True,
    },
  }
  return architecture.decoder_config(
    [layer] * fields.get("n_layer", int),
    vocab_size=fields.get("vocab_size", int),
    embed_dim=width,
    norm="layer",
    norm_eps=fields.get("layer_norm_epsilon", float, 1e-5),
    position="learned",
    max_len=fields.get("n_positions", int),
    tie_embeddings=fields.get("tie_word_embeddings", bool, True),
  )


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  return {
    "vocab_size": config.vocab_size,
    "n_embd": config.embed_dim,
    "n_layer": config.num_layers,
    "n_head": architecture.options(config, "mixer", "attention")["num_heads"],
    "n_inner": architecture.options(config, "mlp", "gelu")["hidden_dim"],
    "n_positions": config.max_len,
    "layer_norm_epsilon": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "activation_function": "gelu_new",
  }


def model_rules(config: Any) -> rules.Rules:
  """Where the parameters outside of the layers are."""
  found = {
    "embed/table": rules.same("transformer.wte.weight"),
    "position_embed/table": rules.same("transformer.wpe.weight"),
    "final_norm/scale": rules.same("transformer.ln_f.weight"),
    "final_norm/bias": rules.same("transformer.ln_f.bias"),
  }
  if not config.tie_embeddings:
    found["head"] = rules.matrix("lm_head.weight")
  return found


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  del layer
  width = config.embed_dim
  found = {
    f"{ours}/{part}": rules.same(f"{theirs}.{name}")
    for ours, theirs in (("mixer_norm", "ln_1"), ("mlp_norm", "ln_2"))
    for part, name in (("scale", "weight"), ("bias", "bias"))
  }
  for i, n in enumerate("qkv"):
    at = (i * width, (i + 1) * width, 3 * width)
    found[f"mixer/{n}"] = rules.columns("attn.c_attn.weight", *at)
    found[f"mixer/{n}_bias"] = rules.columns("attn.c_attn.bias", *at)
  for ours, theirs in (
    ("mixer/o", "attn.c_proj"),
    ("mlp/up", "mlp.c_fc"),
    ("mlp/down", "mlp.c_proj"),
  ):
    found[ours] = rules.same(f"{theirs}.weight")
    found[f"{ours}_bias"] = rules.same(f"{theirs}.bias")
  return {ours: llama_like.below(_LAYER, rule) for ours, rule in found.items()}


TECHNIQUE = architecture.Architecture(
  model_type="gpt2",
  class_name="GPT2LMHeadModel",
  read=read,
  write=write,
  model_rules=model_rules,
  layer_rules=layer_rules,
  ignored=("*.attn.bias", "*.attn.masked_bias"),
)
