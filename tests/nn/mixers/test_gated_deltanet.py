"""The Gated DeltaNet layer against Qwen3-Next of HF transformers, and its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.nn.mixers import gated_deltanet

BATCH, LENGTH, WIDTH = 2, 13, 24
KEYS, VALUES, KEY_DIM, VALUE_DIM, TAPS = 2, 4, 8, 6, 4


def _places(length=LENGTH):
  positions = jnp.broadcast_to(jnp.arange(length)[None], (BATCH, length))
  return dict(positions=positions, segments=jnp.ones((BATCH, length), jnp.int32))


def make_qwen(num_values=VALUES, decays=True):
  """Random weights in the layer of Qwen3-Next: `(inputs) -> outputs, gradients`."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from transformers.models.qwen3_next import configuration_qwen3_next as qwen_config
  from transformers.models.qwen3_next import modeling_qwen3_next as qwen

  layer = qwen.Qwen3NextGatedDeltaNet(
    qwen_config.Qwen3NextConfig(
      hidden_size=WIDTH,
      num_hidden_layers=1,
      layer_types=["linear_attention"],
      linear_conv_kernel_dim=TAPS,
      linear_key_head_dim=KEY_DIM,
      linear_value_head_dim=VALUE_DIM,
      linear_num_key_heads=KEYS,
      linear_num_value_heads=num_values,
      rms_norm_eps=1e-5,
    ),
    layer_idx=0,
  ).float()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in layer.named_parameters():
      offset = 1.0 if name.startswith("norm") else 0.0
      p.copy_(offset + 0.5 * torch.randn(p.shape, generator=generator))
    if not decays:
      layer.A_log.fill_(-torch.inf)

  def run(x, weights):
    x = torch.tensor(x, requires_grad=True)
    y = layer(x)
    (y * torch.tensor(weights)).sum().backward()
    grads = {name: p.grad.numpy() for name, p in layer.named_parameters()}
    return y.detach().numpy(), grads, x.grad.numpy()

  state = {name: p.detach().numpy() for name, p in layer.named_parameters()}
  return state, run


def from_qwen(state, num_values=VALUES):
  """The parameters of Qwen3-Next's layer, or their gradients, as separate weights."""
  ratio = num_values // KEYS
  sizes = [KEY_DIM, KEY_DIM, ratio * VALUE_DIM, ratio * VALUE_DIM]
  # Its fused projections hold, key head by key head, q, k, v, z and beta, dt.
  by_head = lambda w, sizes: [
    part.reshape(-1, WIDTH).T
    for part in np.split(w.reshape(KEYS, -1, WIDTH), np.cumsum(sizes)[:-1], axis=1)
  ]
  q, k, v, z = by_head(state["in_proj_qkvz.weight"], sizes)
  beta, dt = by_head(state["in_proj_ba.weight"], [ratio, ratio])
  taps = state["conv1d.weight"][:, 0].T
  cuts = [KEYS * KEY_DIM, 2 * KEYS * KEY_DIM]
  conv_q, conv_k, conv_v = np.split(taps, cuts, axis=1)
  return {
    "q": q,
    "k": k,
    "v": v,
    "gate": z,
    "beta": beta,
    "dt": dt,
    "conv_q": conv_q,
    "conv_k": conv_k,
    "conv_v": conv_v,
    "dt_bias": state["dt_bias"],
    "a_log": state["A_log"],
    "norm": {"scale": state["norm.weight"]},
    "o": state["out_proj.weight"].T,
  }


def close(a, b, what, tolerance=1e-4):
  limit = tolerance * max(1.0, float(np.max(np.abs(b))))
  assert float(np.max(np.abs(np.asarray(a) - b))) <= limit, what


def compare(module, params, expected, run):
  """Outputs and every gradient, `expected(gradients)` as our tree."""
  rng = np.random.default_rng(0)
  x, weights = rng.standard_normal((2, BATCH, LENGTH, WIDTH)).astype(np.float32)
  wanted, grads, dx = run(x, weights)

  def loss(params, x_BLD):
    y_BLD, _ = module.apply({"params": params}, x_BLD, **_places())
    return jnp.sum(y_BLD * weights), y_BLD

  (ours, dx_BLD), y_BLD = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
    jax.tree.map(jnp.asarray, params), jnp.asarray(x)
  )
  close(y_BLD, wanted, "outputs")
  close(dx_BLD, dx, "inputs")
  tree = expected(grads)
  assert jax.tree.structure(ours) == jax.tree.structure(tree)
  jax.tree.map_with_path(lambda path, a, b: close(a, b, path), ours, tree)


@pytest.mark.oracle
@pytest.mark.parametrize("num_values", [KEYS, VALUES])
def test_outputs_and_every_gradient_equal_qwen3_next(num_values):
  state, run = make_qwen(num_values)
  module = gated_deltanet.GatedDeltaNet(
    gated_deltanet.GatedDeltaNetOptions(
      num_heads=KEYS,
      num_value_heads=num_values,
      head_dim=KEY_DIM,
      value_dim=VALUE_DIM,
      chunk=5,
    ),
    WIDTH,
  )
  mapping = lambda state: from_qwen(state, num_values)
  compare(module, mapping(state), mapping, run)


def test_defaults_are_those_of_the_source():
  opts = gated_deltanet.GatedDeltaNetOptions()
  assert opts.sizes(2048) == (256, 512) and opts.width(2048) == 3072
  module = gated_deltanet.GatedDeltaNet(opts, 64)
  x_BLD = jnp.zeros((BATCH, LENGTH, 64))
  params = jax.jit(module.init)(jax.random.key(0), x_BLD, **_places())["params"]
  assert jax.tree.map(lambda z: z.shape, params) == {
    "q": (64, 48),
    "k": (64, 48),
    "v": (64, 96),
    "gate": (64, 96),
    "beta": (64, 6),
    "dt": (64, 6),
    "conv_q": (4, 48),
    "conv_k": (4, 48),
    "conv_v": (4, 96),
    "dt_bias": (6,),
    "a_log": (6,),
    "norm": {"scale": (16,)},
    "o": (96, 64),
  }
  rates, steps = np.exp(params["a_log"]), np.log1p(np.exp(params["dt_bias"]))
  assert (0 < rates).all() and (rates <= 16).all()
  assert (steps > 0.99e-3).all() and (steps < 1.01e-1).all()


def test_twice_the_correction():
  """`allow_neg_eigval` doubles beta: the same as more weight on a saturated gate."""
  make = lambda flag: gated_deltanet.GatedDeltaNet(
    gated_deltanet.GatedDeltaNetOptions(
      num_heads=2, head_dim=4, chunk=4, allow_neg_eigval=flag
    ),
    WIDTH,
  )
  x_BLD = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
  x_BLD = x_BLD.at[..., 0].set(1.0)
  params = jax.jit(make(True).init)(jax.random.key(1), x_BLD, **_places())["params"]
  beta = lambda logit: jnp.zeros((WIDTH, 2)).at[0].set(logit)
  # 2 sigmoid(0) = 1 = sigmoid(inf)
  doubled = make(True).apply(
    {"params": params | {"beta": beta(0.0)}}, x_BLD, **_places()
  )
  full = make(False).apply(
    {"params": params | {"beta": beta(99.0)}}, x_BLD, **_places()
  )
  np.testing.assert_allclose(doubled[0], full[0], atol=1e-6)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(head_dim=0), "head_dim=0 must be positive"),
    (dict(conv_taps=1), "conv_taps=1 must be at least 2"),
    (dict(num_value_heads=9), "num_value_heads=9 must be a multiple of num_heads=6"),
    (dict(num_heads=5), "expand_k=0.75 of width 64 must be a multiple of its num_h"),
    (dict(expand_v=1.3), "expand_v=1.3 times a key head of 8 must be whole"),
    (dict(dt_min=1.0), "dt_min=1.0 must be positive and below dt_max=0.1"),
  ],
)
def test_errors_name_the_field(options, message):
  with pytest.raises(errors.InputError, match=message):
    gated_deltanet.GatedDeltaNetOptions(**options).width(64)
