"""Models with groups at zero, and how they are pruned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from effjax.compress import api, registry
from effjax.core import layers
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.models import config as config_lib
from effjax.models import decoder

DIM, VOCAB, LENGTH = 16, 32, 9
STRUCTURED = registry.find("structured")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A model, and which of its groups are to go.

  Attributes:
    groups: what is pruned.
    sparsity: share of it.
    mixer, mlp: of both layers, with their options.
    zero: for each of the two layers, by the end of a path, the dimension and the
      entries that are zero; of experts an entry list for each.
  """

  groups: str
  sparsity: float
  mixer: str = "attention"
  mixer_options: dict = dataclasses.field(default_factory=dict)
  mlp: str = "none"
  mlp_options: dict = dataclasses.field(default_factory=dict)
  zero: tuple[dict, dict]


GQA = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
_MAMBA2 = {"inner_dim": 16, "head_dim": 4, "state_dim": 4, "chunk": 4}


def _entries(units, size):
  return [u * size + i for u in units for i in range(size)]


def zeros(dims, *units, sizes=1):
  """The zero entries of both layers: `dims` by path, one list of units a layer."""
  sizes = sizes if isinstance(sizes, dict) else dict.fromkeys(dims, sizes)
  return tuple(
    {path: (dim, _entries(own, sizes[path])) for path, dim in dims.items()}
    for own in units
  )


_SWIGLU = {"mlp/gate": -1, "mlp/up": -1, "mlp/down": -2}
_MAMBA2_DIMS = {
  "mixer/z": -1,
  "mixer/x": -1,
  "mixer/conv_x": -1,
  "mixer/conv_x_bias": -1,
  "mixer/norm/scale": -1,
  "mixer/out": -2,
} | dict.fromkeys(("mixer/dt", "mixer/dt_bias", "mixer/a_log", "mixer/d"), -1)
_MAMBA2_SIZES = dict.fromkeys(_MAMBA2_DIMS, 4) | dict.fromkeys(
  ("mixer/dt", "mixer/dt_bias", "mixer/a_log", "mixer/d"), 1
)
_STATE = dict.fromkeys(("b", "c", "conv_b", "conv_b_bias", "conv_c", "conv_c_bias"), 4)

CASES = {
  "neurons": Case(
    groups="neurons",
    sparsity=0.25,
    mlp="swiglu",
    mlp_options={"hidden_dim": 8},
    zero=zeros(_SWIGLU, (1, 6), (0, 7)),
  ),
  "neurons with biases": Case(
    groups="neurons",
    sparsity=0.25,
    mlp="gelu",
    mlp_options={"hidden_dim": 8},
    zero=zeros({"mlp/up": -1, "mlp/up_bias": -1, "mlp/down": -2}, (1, 6), (0, 7)),
  ),
  "heads, one of each key head": Case(
    groups="heads",
    sparsity=0.5,
    mixer_options=GQA | {"bias": True, "qk_norm": True},
    zero=zeros(
      {"mixer/q": -1, "mixer/q_bias": -1, "mixer/o": -2}, (0, 3), (1, 2), sizes=4
    ),
  ),
  "heads with keys of their own": Case(
    groups="heads",
    sparsity=0.25,
    mixer_options=GQA | {"num_kv_heads": 4},
    zero=zeros(
      {"mixer/q": -1, "mixer/k": -1, "mixer/v": -1, "mixer/o": -2}, (2,), (0,), sizes=4
    ),
  ),
  "key groups": Case(
    groups="kv_groups",
    sparsity=0.5,
    mixer_options=GQA,
    zero=zeros(
      {"mixer/q": -1, "mixer/k": -1, "mixer/v": -1, "mixer/o": -2},
      (0,),
      (1,),
      sizes={"mixer/q": 8, "mixer/k": 4, "mixer/v": 4, "mixer/o": 8},
    ),
  ),
  "heads of a window with global tokens": Case(
    groups="heads",
    sparsity=0.5,
    mixer="longformer",
    mixer_options=GQA | {"window": 4},
    zero=zeros(
      {"mixer/q": -1, "mixer/q_global": -1, "mixer/o": -2}, (0, 3), (1, 2), sizes=4
    ),
  ),
  "heads of blocks": Case(
    groups="kv_groups",
    sparsity=0.5,
    mixer="bigbird",
    mixer_options=GQA | {"block": 2},
    zero=zeros(
      {"mixer/q": -1, "mixer/k": -1, "mixer/v": -1, "mixer/o": -2},
      (1,),
      (0,),
      sizes={"mixer/q": 8, "mixer/k": 4, "mixer/v": 4, "mixer/o": 8},
    ),
  ),
  "latent heads": Case(
    groups="heads",
    sparsity=0.5,
    mixer="mla",
    mixer_options={
      "num_heads": 4,
      "head_dim": 4,
      "rope_dim": 2,
      "value_dim": 3,
      "kv_rank": 6,
      "q_rank": 8,
    },
    zero=zeros(
      {"mixer/q_up": -1, "mixer/k_up": -1, "mixer/v_up": -1, "mixer/o": -2},
      (0, 2),
      (1, 3),
      sizes={"mixer/q_up": 6, "mixer/k_up": 4, "mixer/v_up": 3, "mixer/o": 3},
    ),
  ),
  "neurons of shared experts and of each expert": Case(
    groups="neurons",
    sparsity=0.5,
    mlp="moe",
    mlp_options={"num_experts": 3, "top_k": 2, "hidden_dim": 4, "num_shared": 1},
    zero=tuple(
      {f"mlp/shared/{name}": (dim, shared) for name, dim in dims.items()}
      | {f"mlp/{name}": (dim, own) for name, dim in dims.items()}
      for dims in [{"gate": -1, "up": -1, "down": -2}]
      for shared, own in (
        ([0, 2], [[0, 1], [1, 3], [2, 3]]),
        ([1, 3], [[2, 3], [0, 1], [0, 3]]),
      )
    ),
  ),
  "heads of a state space": Case(
    groups="ssm_heads",
    sparsity=0.25,
    mixer="mamba2",
    mixer_options=_MAMBA2,
    zero=zeros(_MAMBA2_DIMS, (1,), (3,), sizes=_MAMBA2_SIZES),
  ),
  "heads of each group of a state space": Case(
    groups="ssm_heads",
    sparsity=0.5,
    mixer="mamba2",
    mixer_options=_MAMBA2 | {"num_groups": 2},
    zero=zeros(_MAMBA2_DIMS, (0, 3), (1, 2), sizes=_MAMBA2_SIZES),
  ),
  "groups of one head of a state space": Case(
    groups="ssm_heads",
    sparsity=0.5,
    mixer="mamba2",
    mixer_options=_MAMBA2 | {"num_groups": 4},
    zero=zeros(
      _MAMBA2_DIMS | {f"mixer/{name}": -1 for name in _STATE},
      (0, 3),
      (1, 2),
      sizes=_MAMBA2_SIZES | {f"mixer/{name}": 4 for name in _STATE},
    ),
  ),
  "channels of mamba": Case(
    groups="ssm_heads",
    sparsity=0.25,
    mixer="mamba1",
    mixer_options={"inner_dim": 8, "state_dim": 3, "inner_norm": True, "chunk": 4},
    zero=zeros(
      dict.fromkeys(
        (
          "mixer/z",
          "mixer/x",
          "mixer/conv_x",
          "mixer/conv_x_bias",
          "mixer/a_log",
          "mixer/d",
          "mixer/dt_up",
          "mixer/dt_bias",
        ),
        -1,
      )
      | dict.fromkeys(("mixer/b", "mixer/c", "mixer/dt_down", "mixer/out"), -2),
      (1, 6),
      (0, 7),
    ),
  ),
  "value heads of the gated delta rule": Case(
    groups="ssm_heads",
    sparsity=0.5,
    mixer="gated_deltanet",
    mixer_options={
      "num_heads": 2,
      "num_value_heads": 4,
      "head_dim": 4,
      "value_dim": 3,
      "chunk": 4,
    },
    zero=zeros(
      {"mixer/v": -1, "mixer/conv_v": -1, "mixer/gate": -1, "mixer/o": -2}
      | dict.fromkeys(("mixer/beta", "mixer/dt", "mixer/dt_bias", "mixer/a_log"), -1),
      (0, 3),
      (1, 2),
      sizes={"mixer/v": 3, "mixer/conv_v": 3, "mixer/gate": 3, "mixer/o": 3}
      | dict.fromkeys(("mixer/beta", "mixer/dt", "mixer/dt_bias", "mixer/a_log"), 1),
    ),
  ),
}
_OWN_HEADS = {
  "deltanet": ({"output_gate": True}, ("conv_q", "conv_k", "conv_v", "beta", "gate")),
  "gated_deltanet": (
    {},
    ("conv_q", "conv_k", "conv_v", "beta", "dt", "dt_bias", "a_log", "gate"),
  ),
  "gla": ({"rank": 4}, ("decay_up", "decay_bias", "gate")),
  "linear_attention": ({}, ()),
  "performer": ({"num_features": 8}, ()),
}
for _name, (_options, _more) in _OWN_HEADS.items():
  _single = {"beta", "dt", "dt_bias", "a_log"}
  _dims = {f"mixer/{name}": -1 for name in ("q", "k", "v", *_more)} | {"mixer/o": -2}
  CASES[f"heads of {_name}"] = Case(
    groups="heads",
    sparsity=0.5,
    mixer=_name,
    mixer_options=_options
    | {"num_heads": 4, "head_dim": 4, "chunk": 4}
    | ({} if _name in ("linear_attention", "performer") else {"value_dim": 4}),
    zero=zeros(
      _dims,
      (0, 3),
      (1, 2),
      sizes={path: 1 if path.split("/")[-1] in _single else 4 for path in _dims},
    ),
  )


def model_of(case, scan=True, **more):
  config = config_lib.DecoderConfig(
    vocab_size=VOCAB,
    embed_dim=DIM,
    num_layers=2,
    pattern=(case.mixer,),
    mlp=case.mlp,
    mixer_options={case.mixer: case.mixer_options},
    mlp_options={case.mlp: case.mlp_options} if case.mlp != "none" else {},
    scan=scan,
    **more,
  )
  return decoder.Decoder(config)


def params_of(model, seed=0):
  """Parameters of which nothing is zero or one."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())
  draw = lambda a: jnp.asarray(0.4 * rng.standard_normal(a.shape) + 0.1, jnp.float32)
  return jax.tree.map(draw, shapes["params"])


def with_zeros(model, params, zero, value=0):
  unrolled, tree = layers.unstack(model, params)
  flat = tree_lib.flatten(tree)
  used = 0
  for k, own in enumerate(zero):
    for end, (dim, at) in own.items():
      path = f"layer_{k}/{end}"
      array = np.array(flat[path])
      if isinstance(at[0], list):
        for e, mine in enumerate(at):
          np.moveaxis(array[e], dim, 0)[mine] = value
      else:
        np.moveaxis(array, dim, 0)[at] = value
      flat[path] = jnp.asarray(array)
      used += 1
  assert used
  tree = tree_lib.unflatten(flat)
  return tree if model.runs is None else layers.restack(unrolled, tree)[1]


def logits_of(model, params, tokens_BL):
  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens_BL)[0])


def tokens():
  return jnp.asarray(
    np.random.default_rng(1).integers(VOCAB, size=(2, LENGTH)), jnp.int32
  )


def pruned(model, params, batches=(), where=None, **options):
  specs = specs_lib.specs(model)
  return api.transform(
    STRUCTURED, model, params, specs, batches, where=where, options=options
  )


EXPERTS = {"num_experts": 4, "top_k": 2, "hidden_dim": 4}


def deep(num_layers=4, **more):
  config = config_lib.DecoderConfig(
    vocab_size=VOCAB,
    embed_dim=DIM,
    num_layers=num_layers,
    mlp="swiglu",
    mixer_options={"attention": GQA},
    mlp_options={"swiglu": {"hidden_dim": 16}},
    **more,
  )
  return decoder.Decoder(config)
