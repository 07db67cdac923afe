"""Outputs and every gradient equal transformers' Mamba on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import layers
from effjax.core import tree as tree_lib
from effjax.models import config, decoder

pytestmark = pytest.mark.oracle

VOCAB, WIDTH, LENGTH, INNER, STATES, RANK = 48, 32, 13, 64, 6, 3
PLAIN = {
  "a_log": "A_log",
  "d": "D",
  "dt_bias": "dt_proj.bias",
  "dt_up": "dt_proj.weight",
  "conv_x_bias": "conv1d.bias",
  "out": "out_proj.weight",
}


def _theirs():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = transformers.MambaForCausalLM(
    transformers.MambaConfig(
      vocab_size=VOCAB,
      hidden_size=WIDTH,
      num_hidden_layers=2,
      state_size=STATES,
      time_step_rank=RANK,
      expand=INNER // WIDTH,
      conv_kernel=4,
      use_bias=False,
      use_conv_bias=True,
      tie_word_embeddings=True,
    )
  )
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      offset = 1.0 if "norm" in name or name.endswith(".D") else 0.0
      p.copy_(offset + 0.3 * torch.randn(p.shape, generator=generator))
  return model.float().eval()


def _mapping(theirs):
  """Parameters (or gradients) by their names to ours, `[in, out]`, nothing fused."""
  flat = {
    "embed/table": theirs["backbone.embeddings.weight"],
    "final_norm/scale": theirs["backbone.norm_f.weight"],
  }
  for i in range(2):
    layer = {
      name.removeprefix(f"backbone.layers.{i}."): value.T
      for name, value in theirs.items()
      if name.startswith(f"backbone.layers.{i}.")
    }
    x, z = np.split(layer["mixer.in_proj.weight"], 2, axis=1)
    cuts = [RANK, RANK + STATES]
    dt, b, c = np.split(layer["mixer.x_proj.weight"], cuts, axis=1)
    mixer = {"x": x, "z": z, "dt_down": dt, "b": b, "c": c}
    mixer["conv_x"] = layer["mixer.conv1d.weight"][:, 0]
    mixer |= {ours: layer[f"mixer.{name}"] for ours, name in PLAIN.items()}
    flat |= {f"layer_{i}/mixer/{name}": value for name, value in mixer.items()}
    flat[f"layer_{i}/mixer_norm/scale"] = layer["norm.weight"]
  return flat


def _close(a, b, what):
  limit = 1e-4 * max(1.0, float(np.max(np.abs(b))))
  assert float(np.max(np.abs(np.asarray(a) - b))) <= limit, what


def test_logits_and_gradients():
  torch = pytest.importorskip("torch")
  theirs = _theirs()
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCAB, (2, LENGTH))
  probe = rng.standard_normal((2, LENGTH, VOCAB)).astype(np.float32)
  wanted = theirs(torch.tensor(tokens), use_cache=False).logits
  (wanted * torch.tensor(probe)).sum().backward()
  named = dict(theirs.named_parameters())

  options = {"inner_dim": INNER, "state_dim": STATES, "dt_rank": RANK, "chunk": 5}
  cfg = config.DecoderConfig(
    vocab_size=VOCAB,
    embed_dim=WIDTH,
    num_layers=2,
    pattern=("mamba1",),
    mlp="none",
    mixer_options={"mamba1": options},
  )
  params = _mapping({name: p.detach().numpy() for name, p in named.items()})
  params = tree_lib.unflatten(jax.tree.map(jnp.asarray, params))
  model, params = layers.restack(decoder.Decoder(cfg).with_runs(None), params)

  def loss(params):
    logits, _ = model.apply({"params": params}, jnp.asarray(tokens, jnp.int32))
    return jnp.sum(logits * probe), logits

  (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  _close(logits, wanted.detach().numpy(), "logits")
  gradient = tree_lib.flatten(layers.unstack(model, gradient)[1])
  expected = _mapping({name: p.grad.numpy() for name, p in named.items()})
  assert gradient.keys() == expected.keys()
  for path, value in expected.items():
    _close(gradient[path], value, path)
