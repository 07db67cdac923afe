"""Tiny random models of every architecture of GGUF, by a name of their own."""

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.data import tokenizers
from effjax.interop.gguf import export
from effjax.models import config as model_config
from effjax.models import decoder

# A token a byte, and one that begins a text.
VOCAB, WIDTH, LENGTH = 257, 64, 24
_KEPT = ("a_log", "dt_bias")


def attention(**options):
  return {"attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16} | options}


def scaled(kind, **options):
  return attention(rope_scaling={"kind": kind, "factor": 4.0} | options)


_GATED = {"mlp_options": {"swiglu": {"hidden_dim": 96}}}
_EXPERTS = {
  "mlp": "moe",
  "mlp_options": {"moe": {"num_experts": 4, "top_k": 2, "hidden_dim": 96}},
}
_STATES = {"head_dim": 32, "state_dim": 16, "num_groups": 2}
_PLAIN = {"num_kv_heads": 4, "position": "none", "bias": True}
MODELS = {
  "llama": {"mixer_options": attention(), **_GATED},
  "llama-untied": {
    "mixer_options": attention(bias=True, head_dim=32),
    "tie_embeddings": False,
  },
  "llama-linear": {"mixer_options": scaled("linear")},
  "llama-yarn": {"mixer_options": scaled("yarn", original_max_len=32)},
  "llama-scaled": {
    "mixer_options": scaled("yarn", original_max_len=32, attention_factor=1.3)
  },
  "llama-3": {
    "mixer_options": scaled("llama3", original_max_len=48, high_freq_factor=5.0)
  },
  "llama-experts": {"mixer_options": attention(), **_EXPERTS},
  "qwen2": {"mixer_options": attention(bias=True, out_bias=False)},
  "qwen3": {"mixer_options": attention(qk_norm=True, head_dim=32), **_GATED},
  "qwen3moe": {"mixer_options": attention(qk_norm=True), **_EXPERTS},
  "mamba": {"pattern": ("mamba1",), "mlp": "none"},
  "mamba2": {
    "pattern": ("mamba2",),
    "mlp": "none",
    "mixer_options": {"mamba2": _STATES},
  },
  "gpt2": {
    "mixer_options": attention(**_PLAIN),
    "mlp": "gelu",
    "mlp_options": {"gelu": {"hidden_dim": 128, "approximate": True}},
    "norm": "layer",
    "position": "learned",
  },
}


def architecture(name):
  return name.partition("-")[0]


def build(name, **changes):
  """A model, random parameters of it, and its specs."""
  sizes = {"vocab_size": VOCAB, "embed_dim": WIDTH, "num_layers": 2, "max_len": 128}
  model = decoder.Decoder(model_config.DecoderConfig(**sizes | MODELS[name] | changes))
  rng = np.random.default_rng(0)
  made = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))

  def draw(path, leaf):
    if path.endswith(_KEPT):
      return leaf
    center = 1.0 if path.endswith("scale") else 0.0
    # Activations of about one: llama.cpp rounds them, too, where weights are quantized.
    scale = model.config.embed_dim**-0.5
    values = center + scale * rng.standard_normal(leaf.shape)
    return jnp.asarray(values, jnp.float32)

  return model, tree_lib.map_leaves(draw, made["params"]), specs_lib.specs(model)


def saved(path, name, type="F32", **changes):
  """A file of a model with a byte tokenizer; the model and its parameters, too."""
  model, params, specs = build(name, **changes)
  export.save(
    path,
    model,
    params,
    specs,
    tokenizers.byte_tokenizer(),
    type=type,
    architecture=architecture(name),
  )
  return model, params


def tokens(length=LENGTH):
  return np.random.default_rng(1).integers(1, VOCAB, length).tolist()


def logits(model, params, ids):
  """float32 [L, V]."""
  tokens_BL = jnp.asarray([ids], jnp.int32)
  return np.asarray(jax.jit(model.apply)({"params": params}, tokens_BL)[0][0])
