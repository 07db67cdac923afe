"""Tiny random decoders of every kind that ONNX can express."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.models import config, decoder

VOCAB, WIDTH, LENGTH = 48, 64, 13
# Tokens of each row of `tokens`; the rest is padding.
LENGTHS = (13, 11, 8)
_HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
_YARN = {"kind": "yarn", "factor": 4.0, "original_max_len": 8}
_LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_max_len": 16}
_EXPERTS = {"num_experts": 4, "hidden_dim": 64}


def _attention(**options):
  return {"mixer_options": {"attention": _HEADS | options}}


def _layers(*all_options):
  return {
    "layers": tuple(
      config.LayerConfig(mixer="attention", mixer_options=_HEADS | options)
      for options in all_options
    )
  }


# Fields of a config beside those that all have.
CONFIGS = {
  "llama": _attention(rope_theta=1000.0) | {"tie_embeddings": False},
  "llama-3": _attention(rope_theta=1000.0, rope_scaling=_LLAMA3),
  "linear": _attention(rope_scaling={"kind": "linear", "factor": 2.0}),
  "ntk": _attention(rope_scaling={"kind": "ntk", "factor": 2.0}),
  "yarn": _attention(rope_scaling=_YARN),
  "mistral": _attention(window=5),
  "windows": _layers({"window": 3}, {}, {"window": 6}),
  "qwen2": _attention(bias=True, out_bias=False),
  "qwen3": _attention(qk_norm=True, qk_norm_eps=1e-6),
  "gpt2": _attention(num_kv_heads=4, bias=True, position="none")
  | {
    "mlp": "gelu",
    "mlp_options": {"gelu": {"approximate": True}},
    "norm": "layer",
    "position": "learned",
  },
  "exact-gelu": _attention(position="alibi")
  | {"mlp": "gelu", "mlp_options": {"gelu": {"bias": False}}},
  "gemma": _attention(num_kv_heads=1, logit_cap=2.0, position="alibi")
  | {"logit_cap": 3.0},
  "mixtral": _attention()
  | {"mlp": "moe", "mlp_options": {"moe": _EXPERTS}, "tie_embeddings": False},
  "switch": _attention()
  | {
    "mlp": "moe",
    "mlp_options": {"moe": _EXPERTS | {"router": "switch", "num_shared": 1}},
  },
  "albert": _attention() | {"share": 2, "num_layers": 4},
  "borrowed": _attention() | {"share_keys": 2, "num_layers": 4},
  "attention-only": _attention() | {"mlp": "none", "scan": False},
}


def build(name):
  """The model of a name, random parameters, and their specs."""
  fields = {"num_layers": 3, "max_len": 32} | CONFIGS[name]
  model = decoder.Decoder(
    config.DecoderConfig(vocab_size=VOCAB, embed_dim=WIDTH, **fields)
  )
  specs = specs_lib.specs(model)
  rng = np.random.default_rng(0)

  def one(path, spec):
    center = 1.0 if path.endswith("scale") else 0.0
    values = center + 0.1 * rng.standard_normal(spec.shape)
    return jnp.asarray(values, jnp.float32)

  return model, tree_lib.map_leaves(one, specs), specs


def tokens():
  """int64 `[rows, LENGTH]`, and the mask of LENGTHS."""
  ids = np.random.default_rng(1).integers(0, VOCAB, (len(LENGTHS), LENGTH))
  return ids, (np.arange(LENGTH) < np.array(LENGTHS)[:, None]).astype(np.int64)


@functools.partial(jax.jit, static_argnames="model")
def _apply(model, params, ids, segments):
  return model.apply({"params": params}, ids, segments=segments)[0]


def logits(model, params):
  """Our logits of `tokens`, of the rows' own tokens only: `[sum(LENGTHS), V]`."""
  ids, mask = (jnp.asarray(part, jnp.int32) for part in tokens())
  return np.asarray(_apply(model, params, ids, mask))[np.asarray(mask) > 0]


class Runtime:
  """A file in ONNX Runtime, with its cache."""

  def __init__(self, path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    self.session = onnxruntime.InferenceSession(
      path, options, providers=["CPUExecutionProvider"]
    )
    self._past = [
      (item.name, item.shape)
      for item in self.session.get_inputs()
      if item.name.startswith("past_key_values.")
    ]

  def __call__(self, ids, mask, present=None):
    """Logits, and what to give the next time."""
    feed = {"input_ids": ids, "attention_mask": mask}
    if present is None:
      present = [
        np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
        for _, shape in self._past
      ]
    feed |= {name: array for (name, _), array in zip(self._past, present, strict=True)}
    result, *present = self.session.run(None, feed)
    return result, present
