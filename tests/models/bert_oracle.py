"""Comparing an encoder with models of HF transformers that are built like BERT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import layers
from effjax.core import tree as tree_lib
from effjax.models import encoder, encoder_config

VOCAB, WIDTH, HIDDEN, HEADS, MAX_LEN = 48, 32, 56, 4, 64

# Ours to theirs, by the shape they share: BERT's names inside one layer.
LAYER = {
  **{f"mixer/{n[0]}": f"attention.self.{n}" for n in ("query", "key", "value")},
  "mixer/o": "attention.output.dense",
  "mixer_norm": "attention.output.LayerNorm",
  "mlp/up": "intermediate.dense",
  "mlp/down": "output.dense",
  "mlp_norm": "output.LayerNorm",
}
EMBEDDINGS = {
  "embed": "word_embeddings",
  "position_embed": "position_embeddings",
  "type_embed": "token_type_embeddings",
}


def close(a, b, what="logits"):
  """The largest difference over the largest value or 1, which 1e-4 must hold."""
  a, b = np.asarray(a), np.asarray(b)
  assert a.shape == b.shape, what
  difference = float(np.max(np.abs(a - b))) / max(1.0, float(np.max(np.abs(b))))
  assert difference <= 1e-4, what
  return difference


def linear(state, ours, theirs):
  """A matrix as `[in, out]`, and its bias."""
  flat = {ours: state[f"{theirs}.weight"].T}
  if f"{theirs}.bias" in state:
    flat[f"{ours}_bias"] = state[f"{theirs}.bias"]
  return flat


def layer_norm(state, ours, theirs):
  """A scale and a bias."""
  return {
    f"{ours}/scale": state[f"{theirs}.weight"],
    f"{ours}/bias": state[f"{theirs}.bias"],
  }


def layer(state, ours, theirs, names):
  """All parameters of one layer: norms are those with "norm" in our name."""
  flat = {}
  for a, b in names.items():
    convert = layer_norm if "norm" in a else linear
    flat |= convert(state, f"{ours}/{a}", f"{theirs}.{b}")
  return flat


def embeddings(state, theirs):
  """The three tables and, where there is one, their norm."""
  flat = {}
  for a, b in EMBEDDINGS.items():
    if f"{theirs}.{b}.weight" in state:
      flat[f"{a}/table"] = state[f"{theirs}.{b}.weight"]
  if f"{theirs}.LayerNorm.weight" in state:
    flat |= layer_norm(state, "embed_norm", f"{theirs}.LayerNorm")
  return flat


def head(state, dense, norm, bias):
  """The masked-language head."""
  flat = linear(state, "head", dense) | layer_norm(state, "head_norm", norm)
  return flat | {"vocab_bias": state[bias]}


def bert(state, names=LAYER, num_layers=2):
  """Every parameter of a masked-language model with BERT's names."""
  flat = embeddings(state, "bert.embeddings")
  for i in range(num_layers):
    flat |= layer(state, f"layer_{i}", f"bert.encoder.layer.{i}", names)
  transform = "cls.predictions.transform"
  return flat | head(
    state, f"{transform}.dense", f"{transform}.LayerNorm", "cls.predictions.bias"
  )


def randomized(model):
  """Random weights everywhere: biases and offsets of norms are not zero either."""
  torch = pytest.importorskip("torch")
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      is_scale = p.ndim == 1 and "norm" in name.lower() and name.endswith("weight")
      is_scale = is_scale or name.endswith(".ln.weight")
      p.copy_(float(is_scale) + 0.2 * torch.randn(p.shape, generator=generator))
  return model.float()


def run_torch(model, inputs, probe_fn):
  """Logits, the probe, and gradients of `sum(logits * probe)` by parameter name.

  A parameter that the logits do not depend on has no gradient and is left out.
  """
  torch = pytest.importorskip("torch")
  logits = model(**{k: torch.tensor(v) for k, v in inputs.items()}).logits
  probe = probe_fn(tuple(logits.shape))
  (logits * torch.tensor(probe)).sum().backward()
  named = dict(model.named_parameters())
  grads = {k: p.grad.numpy() for k, p in named.items() if p.grad is not None}
  return logits.detach().numpy(), probe, grads


def compare(cfg, model, mapping, inputs, tokens=None, positions=None, **ours):
  """Loads `mapping(torch parameters) -> our flat unrolled ones`, compares everything.

  Args:
    cfg: our config.
    model: the randomized torch model.
    mapping: applied to parameters and to gradients.
    inputs: what the torch model is called with, NumPy arrays.
    tokens, positions, **ours: what ours is called with, by default the same tokens.
      With `segments`, logits of padding do not count.

  Returns:
    The largest difference of logits and gradients, see `close`.
  """
  rng = np.random.default_rng(0)
  weigh = ours.get("segments")

  def probe_fn(shape):
    probe = rng.standard_normal(shape).astype(np.float32)
    return probe if weigh is None else probe * (weigh > 0)[..., None]

  logits, probe, grads = run_torch(model, inputs, probe_fn)
  tokens = jnp.asarray(inputs["input_ids"] if tokens is None else tokens, jnp.int32)
  ours = {k: jnp.asarray(v, jnp.int32) for k, v in ours.items()}
  state = {k: v.detach().numpy() for k, v in model.named_parameters()}
  flat = jax.tree.map(jnp.asarray, mapping(state))
  unrolled = encoder.Encoder(cfg).with_runs(None)
  scanned, params = layers.restack(unrolled, tree_lib.unflatten(flat))

  def loss(p):
    y = scanned.apply({"params": p}, tokens, positions, **ours)[0]
    return jnp.sum(y * probe), y

  (_, got), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  counted = np.abs(probe) > 0
  differences = [close(np.asarray(got) * counted, logits * counted)]
  ours = tree_lib.flatten(layers.unstack(scanned, gradient)[1])
  expected = mapping(grads)
  assert ours.keys() == expected.keys()
  for path, value in expected.items():
    # A bias of the keys moves all scores of a query alike, which softmax ignores.
    assert np.any(value != 0) or path.endswith("k_bias"), path
    differences.append(close(ours[path], value, path))
  return max(differences)


def config(**changes):
  """An encoder config of the sizes above."""
  values = {
    "vocab_size": VOCAB,
    "embed_dim": WIDTH,
    "num_layers": 2,
    "max_len": MAX_LEN,
    "mixer_options": {"attention": {"num_heads": HEADS, "head_dim": WIDTH // HEADS}},
    "mlp_options": {"gelu": {"hidden_dim": HIDDEN}},
  }
  return encoder_config.EncoderConfig(**(values | changes))


def hf_sizes(**changes):
  """The same for a config of HF transformers; nothing is dropped."""
  values = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": MAX_LEN,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
  }
  return values | changes


def tokens(length, batch=2):
  """Random tokens; none is a padding token, whose embeddings HF does not train."""
  rng = np.random.default_rng(1)
  return rng.integers(4, VOCAB, (batch, length))
