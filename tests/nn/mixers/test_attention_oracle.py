"""Options of attention equal HF transformers, in outputs and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models import config
from effjax.nn.mixers import attention
from tests.models import test_hf_oracle as oracle

pytestmark = pytest.mark.oracle

HEADS, GROUPS, HEAD_DIM, LENGTH, WIDTH = 4, 2, 8, oracle.LENGTH, oracle.WIDTH

# Name -> HF class, what its config adds, our options, parameters beside q, k, v and o.
MODELS = {
  "mistral": ("Mistral", {"sliding_window": 5}, {"window": 5}, {}),
  "qwen3": (
    "Qwen3",
    {},
    {"qk_norm": True},
    {f"{n}_norm/scale": f"{n}_norm.weight" for n in "qk"},
  ),
  "llama with biases": (
    "Llama",
    {"attention_bias": True},
    {"bias": True},
    {f"{n}_bias": f"{n}_proj.bias" for n in "qkvo"},
  ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
  transformers = pytest.importorskip("transformers")
  kind, theirs, ours, extra = MODELS[name]
  hf = getattr(transformers, f"{kind}ForCausalLM")(
    getattr(transformers, f"{kind}Config")(
      vocab_size=oracle.VOCAB,
      hidden_size=WIDTH,
      intermediate_size=40,
      num_hidden_layers=2,
      num_attention_heads=HEADS,
      num_key_value_heads=GROUPS,
      head_dim=HEAD_DIM,
      rms_norm_eps=1e-5,
      tie_word_embeddings=True,
      attn_implementation="eager",
      **theirs,
    )
  )
  sizes = {"num_heads": HEADS, "num_kv_heads": GROUPS, "head_dim": HEAD_DIM}
  cfg = config.DecoderConfig(
    vocab_size=oracle.VOCAB,
    embed_dim=WIDTH,
    num_layers=2,
    mixer_options={"attention": sizes | ours},
    mlp_options={"swiglu": {"hidden_dim": 40}},
  )
  names = {
    "mixer_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{f"mixer/{n}": f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"mixer/{a}": f"self_attn.{b}" for a, b in extra.items()},
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

  oracle._compare(cfg, mapping, oracle._randomize(hf))


def _compare_module(torch_module, call, split, **options):
  """A causal attention module alone: outputs, gradients of inputs and weights.

  Args:
    torch_module: with random weights.
    call: its output from the inputs.
    split: arrays of its parameters, by name, as ours.
    **options: ours.
  """
  torch = pytest.importorskip("torch")
  oracle._randomize(torch_module)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, LENGTH, WIDTH)).astype(np.float32)
  probe = rng.standard_normal((2, LENGTH, WIDTH)).astype(np.float32)
  x_torch = torch.tensor(x, requires_grad=True)
  expected = call(x_torch)
  (expected * torch.tensor(probe)).sum().backward()
  named = dict(torch_module.named_parameters())
  params = split({k: v.detach().numpy() for k, v in named.items()})
  expected_grads = split({k: v.grad.numpy() for k, v in named.items()})

  module = attention.Attention(attention.AttentionOptions(**options), WIDTH)
  positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], x.shape[:2])

  def loss(params, x):
    y, _ = module.apply(
      {"params": params}, x, positions=positions, segments=jnp.ones_like(positions)
    )
    return jnp.sum(y * probe), y

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (_, y), (grads, dx) = run(jax.tree.map(jnp.asarray, params), jnp.asarray(x))
  oracle._close(y, expected.detach().numpy(), "outputs")
  oracle._close(dx, x_torch.grad.numpy(), "inputs")
  assert grads.keys() == expected_grads.keys()
  for name, gradient in expected_grads.items():
    oracle._close(grads[name], gradient, name)


def test_gemma2_caps_scores():
  torch = pytest.importorskip("torch")
  modeling = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
  cfg = modeling.Gemma2Config(
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=GROUPS,
    head_dim=HEAD_DIM,
    query_pre_attn_scalar=HEAD_DIM,
    attn_logit_softcapping=2.0,
    attn_implementation="eager",
  )
  module = modeling.Gemma2Attention(cfg, layer_idx=1)
  rotary = modeling.Gemma2RotaryEmbedding(cfg)
  mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]

  def call(x):
    angles = rotary(x, torch.arange(LENGTH)[None])
    return module(x, angles, mask)[0]

  _compare_module(
    module,
    call,
    lambda state: {n: state[f"{n}_proj.weight"].T for n in "qkvo"},
    num_heads=HEADS,
    num_kv_heads=GROUPS,
    head_dim=HEAD_DIM,
    logit_cap=2.0,
  )


@pytest.mark.parametrize("heads", [4, 6])
def test_mpt_adds_linear_biases(heads):
  """Six heads are no power of two. The width stays, so heads are of 8 or of 5."""
  torch = pytest.importorskip("torch")
  modeling = pytest.importorskip("transformers.models.mpt.modeling_mpt")
  head_dim = WIDTH // heads
  inner = heads * head_dim
  module = modeling.MptAttention(modeling.MptConfig(d_model=inner, n_heads=heads))
  # Theirs is square; a wider input and output is the same attention.
  module.Wqkv = torch.nn.Linear(WIDTH, 3 * inner, bias=False)
  module.out_proj = torch.nn.Linear(inner, WIDTH, bias=False)
  bias = modeling.build_mpt_alibi_tensor(heads, LENGTH)
  later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]

  def split(state):
    q, k, v = np.split(state["Wqkv.weight"].T, 3, axis=1)
    return {"q": q, "k": k, "v": v, "o": state["out_proj.weight"].T}

  # Their reshape of queries and keys takes the head size from the width.
  module.hidden_size = inner
  _compare_module(
    module,
    lambda x: module(x, bias, attention_mask=later)[0],
    split,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=head_dim,
    position="alibi",
  )
