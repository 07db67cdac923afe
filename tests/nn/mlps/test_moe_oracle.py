"""Experts and routers equal those of HF transformers on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.nn.mlps import moe

pytestmark = pytest.mark.oracle

WIDTH, HIDDEN, EXPERTS = 16, 10, 8


def _mixtral():
  transformers = pytest.importorskip("transformers")
  from transformers.models.mixtral import modeling_mixtral

  config = transformers.MixtralConfig(
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_local_experts=EXPERTS,
    num_experts_per_tok=2,
  )
  config._experts_implementation = "eager"
  return modeling_mixtral.MixtralSparseMoeBlock(config), {}


def _deepseek(renormalize):
  transformers = pytest.importorskip("transformers")
  from transformers.models.deepseek_v3 import modeling_deepseek_v3

  config = transformers.DeepseekV3Config(
    hidden_size=WIDTH,
    moe_intermediate_size=HIDDEN,
    n_routed_experts=EXPERTS,
    num_local_experts=EXPERTS,
    num_experts_per_tok=3,
    n_shared_experts=2,
    n_group=4,
    topk_group=2,
    norm_topk_prob=renormalize,
    routed_scaling_factor=2.5,
  )
  config._experts_implementation = "eager"
  options = {
    "router": "sigmoid",
    "top_k": 3,
    "num_shared": 2,
    "num_groups": 4,
    "top_groups": 2,
    "renormalize": renormalize,
    "routed_scale": 2.5,
  }
  return modeling_deepseek_v3.DeepseekV3MoE(config), options


def _randomize(torch, module):
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for tensor in (*module.parameters(), *module.buffers()):
      tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))


def _converted(module):
  """HF's weights under our names: `[E, out, in]` to `[E, in, out]`."""
  state = {k: jnp.asarray(v.detach().numpy()) for k, v in module.state_dict().items()}
  gate_EFD, up_EFD = jnp.split(state["experts.gate_up_proj"], 2, axis=1)
  params = {
    "router": state["gate.weight"].T,
    "gate": gate_EFD.swapaxes(1, 2),
    "up": up_EFD.swapaxes(1, 2),
    "down": state["experts.down_proj"].swapaxes(1, 2),
  }
  if "gate.e_score_correction_bias" in state:
    params["balance"] = state["gate.e_score_correction_bias"]
    params["shared"] = {
      name: state[f"shared_experts.{name}_proj.weight"].T
      for name in ("gate", "up", "down")
    }
  return params


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek", "deepseek_not_renormalized"])
def test_outputs_and_gradients(name, dispatch):
  torch = pytest.importorskip("torch")
  hf, options = _mixtral() if name == "mixtral" else _deepseek(name == "deepseek")
  _randomize(torch, hf)
  ours = moe.MoE(
    moe.MoEOptions(
      num_experts=EXPERTS,
      hidden_dim=HIDDEN,
      dispatch=dispatch,
      eval_capacity_factor=float(EXPERTS),
      **options,
    ),
    WIDTH,
  )
  rng = np.random.default_rng(0)
  x, probe = rng.standard_normal((2, 2, 13, WIDTH)).astype(np.float32)
  x_torch = torch.tensor(x, requires_grad=True)
  y_torch = hf.eval()(x_torch)
  (y_torch * torch.tensor(probe)).sum().backward()

  def loss(params, x):
    y = ours.apply({"params": params}, x)
    return jnp.sum(y * probe), y

  both = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (dparams, dx), y = both(_converted(hf), x)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
  close(y, y_torch.detach().numpy())
  close(dx, x_torch.grad.numpy())
  close(dparams["router"], hf.gate.weight.grad.numpy().T)
  down = hf.experts.down_proj.grad.numpy()
  close(dparams["down"], down.swapaxes(1, 2))
  gate_up = np.concatenate([dparams["gate"], dparams["up"]], axis=2)
  close(gate_up, hf.experts.gate_up_proj.grad.numpy().swapaxes(1, 2))
