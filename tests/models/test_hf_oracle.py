"""Outputs and every gradient equal HF transformers on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import layers
from effjax.core import tree as tree_lib
from effjax.models import config, decoder

pytestmark = pytest.mark.oracle

VOCAB, WIDTH, LENGTH = 48, 32, 13


def _run_torch(model, tokens, probe):
  """Logits, and gradients of `sum(logits * probe)` by parameter name."""
  torch = pytest.importorskip("torch")
  logits = model(torch.tensor(tokens), use_cache=False).logits
  (logits * torch.tensor(probe)).sum().backward()
  grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
  return logits.detach().numpy(), grads


def _compare(cfg, mapping, torch_model):
  """Loads `mapping(torch parameter) -> our flat unrolled parameters` and compares."""
  model = decoder.Decoder(cfg)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCAB, (2, LENGTH))
  probe = rng.standard_normal((2, LENGTH, VOCAB)).astype(np.float32)
  logits, grads = _run_torch(torch_model, tokens, probe)
  state = {k: v.detach().numpy() for k, v in torch_model.named_parameters()}
  params = tree_lib.unflatten(jax.tree.map(jnp.asarray, mapping(state)))
  unrolled = model.with_runs(None)
  scanned, stacked = layers.restack(unrolled, params)
  loss = lambda p: (lambda y: (jnp.sum(y * probe), y))(
    scanned.apply({"params": p}, jnp.asarray(tokens, jnp.int32))[0]
  )
  (_, ours), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(stacked)
  _close(ours, logits)
  flat = tree_lib.flatten(layers.unstack(scanned, gradient)[1])
  expected = mapping(grads)
  assert flat.keys() == expected.keys()
  for path, value in expected.items():
    _close(flat[path], value, path)


def _close(a, b, what="logits"):
  limit = 1e-4 * max(1.0, float(np.max(np.abs(b))))
  assert float(np.max(np.abs(np.asarray(a) - b))) <= limit, what


def _randomize(torch_model):
  torch = pytest.importorskip("torch")
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in torch_model.named_parameters():
      if name.endswith(("A_log", "dt_bias")):
        continue
      offset = 1.0 if "norm" in name or name.endswith(".D") else 0.0
      noise = torch.randn(p.shape, generator=generator)
      p.copy_(offset + 0.2 * noise)
  return torch_model.float()


def test_llama():
  transformers = pytest.importorskip("transformers")
  hf = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=VOCAB,
      hidden_size=WIDTH,
      intermediate_size=56,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=8,
      rms_norm_eps=1e-5,
      tie_word_embeddings=True,
      attn_implementation="eager",
    )
  )
  cfg = config.DecoderConfig(
    vocab_size=VOCAB,
    embed_dim=WIDTH,
    num_layers=2,
    mixer_options={"attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}},
    mlp_options={"swiglu": {"hidden_dim": 56}},
  )
  names = {
    "mixer_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{f"mixer/{n}": f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"mlp/{n}": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
  }

  def mapping(state):
    flat = {
      "embed/table": state["model.embed_tokens.weight"],
      "final_norm/scale": state["model.norm.weight"],
    }
    for i in range(2):
      for ours, theirs in names.items():
        flat[f"layer_{i}/{ours}"] = state[f"model.layers.{i}.{theirs}"].T
    return flat

  _compare(cfg, mapping, _randomize(hf))


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups):
  transformers = pytest.importorskip("transformers")
  heads, head_dim, state_dim = 4, 16, 8
  inner = heads * head_dim
  hf = transformers.Mamba2ForCausalLM(
    transformers.Mamba2Config(
      vocab_size=VOCAB,
      hidden_size=WIDTH,
      num_hidden_layers=2,
      num_heads=heads,
      head_dim=head_dim,
      state_size=state_dim,
      n_groups=groups,
      expand=2,
      conv_kernel=4,
      chunk_size=4,
      use_bias=False,
      tie_word_embeddings=True,
    )
  )
  mamba = {"head_dim": head_dim, "state_dim": state_dim, "num_groups": groups}
  cfg = config.DecoderConfig(
    vocab_size=VOCAB,
    embed_dim=WIDTH,
    num_layers=2,
    pattern=("mamba2",),
    mlp="none",
    mixer_options={"mamba2": mamba | {"chunk": 5}},
  )
  sizes = [inner, inner, groups * state_dim, groups * state_dim, heads]

  def mapping(state):
    flat = {
      "embed/table": state["backbone.embeddings.weight"],
      "final_norm/scale": state["backbone.norm_f.weight"],
    }
    for i in range(2):
      theirs = {
        name.removeprefix(f"backbone.layers.{i}."): value
        for name, value in state.items()
        if name.startswith(f"backbone.layers.{i}.")
      }
      layer = {"mixer_norm/scale": theirs["norm.weight"]}
      parts = np.split(theirs["mixer.in_proj.weight"].T, np.cumsum(sizes)[:-1], axis=1)
      layer |= {
        f"mixer/{n}": w for n, w in zip(("z", "x", "b", "c", "dt"), parts, strict=True)
      }
      cuts = np.cumsum(sizes[1:4])[:-1]
      kernel = theirs["mixer.conv1d.weight"][:, 0].T
      for n, w in zip("xbc", np.split(kernel, cuts, axis=1), strict=True):
        layer[f"mixer/conv_{n}"] = w
      biases = theirs["mixer.conv1d.bias"]
      for n, w in zip("xbc", np.split(biases, cuts), strict=True):
        layer[f"mixer/conv_{n}_bias"] = w
      layer["mixer/a_log"] = theirs["mixer.A_log"]
      layer["mixer/d"] = theirs["mixer.D"]
      layer["mixer/dt_bias"] = theirs["mixer.dt_bias"]
      layer["mixer/norm/scale"] = theirs["mixer.norm.weight"]
      layer["mixer/out"] = theirs["mixer.out_proj.weight"].T
      flat |= {f"layer_{i}/{name}": value for name, value in layer.items()}
    return flat

  _compare(cfg, mapping, _randomize(hf))
