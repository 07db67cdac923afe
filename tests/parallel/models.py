"""Small decoders and the training of them that every preset must repeat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.compress import registry
from effjax.core import select
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.parallel import spread as spread_lib
from effjax.train import adapters
from effjax.train import config as train_config
from effjax.train import state as state_lib
from effjax.train import step as step_lib
from effjax.weights.leaves import quantized

BATCH, LENGTH, VOCAB = 8, 32, 64
NUM_STEPS = 5

_ATTENTION = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 8}
_MAMBA2 = {"head_dim": 8, "state_dim": 8, "chunk": 8, "num_groups": 1}
_MOE = {
  "num_experts": 8,
  "hidden_dim": 16,
  "capacity_factor": 8.0,
  "eval_capacity_factor": 8.0,
  "balancing_loss": 0.0,
}
_MODELS = {
  "dense": {"pattern": ("attention",), "mlp": "swiglu"},
  "moe": {"pattern": ("attention",), "mlp": "moe"},
  "dropless": {
    "pattern": ("attention",),
    "mlp": "moe",
    "mlp_options": {"moe": _MOE | {"dispatch": "dropless"}},
  },
  "mamba2": {"pattern": ("mamba2",), "mlp": "none"},
  "hybrid": {"pattern": ("mamba2", "attention"), "mlp": "swiglu"},
}
NAMES = tuple(_MODELS)
WITH_EXPERTS = ("moe", "dropless")


def config(name, **changes):
  """The config of a model of this file."""
  values = {
    "num_layers": 4,
    "embed_dim": 32,
    "vocab_size": VOCAB,
    "max_len": 64,
    "mixer_options": {"attention": _ATTENTION, "mamba2": _MAMBA2},
    "mlp_options": {"swiglu": {"hidden_dim": 64}, "moe": _MOE},
  } | _MODELS[name]
  used = {*values["pattern"], values["mlp"]}
  for options in ("mixer_options", "mlp_options"):
    values[options] = {k: v for k, v in values[options].items() if k in used}
  return model_config.DecoderConfig(**(values | changes))


@functools.cache
def model(name, kind=None):
  """A model of this file, its parameters (as leaves of a kind) and specs."""
  made = decoder.Decoder(config(name))
  specs = specs_lib.specs(made)
  if kind is None:
    init = lambda key: made.init(key, *made.example_inputs())["params"]
    return made, jax.jit(init)(jax.random.key(0)), specs
  params = model(name)[1]
  for technique, options in LEAVES[kind]:
    params = registry.find(technique)(params, specs, options=options)
  return made, params, specs


# How weights become leaves of a kind, one transform after the other.
LEAVES = {
  "int8": [("rtn", {"bits": 8})],
  "qlora": [("rtn", {"bits": 4, "group": 8}), ("lora", {"rank": 4})],
  "lowrank": [("svd", {"rank": 8})],
  "qat": [("qat", {"bits": 4})],
}


def batch(step=0):
  """Packed rows: two documents and some padding in every other one."""
  rng = np.random.default_rng(step)
  ids = rng.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
  segments = np.ones((BATCH, LENGTH), np.int32)
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
  segments[::2, 11:] = 2
  positions[::2, 11:] -= 11
  segments[1::4, 27:] = 0
  weights = (segments > 0).astype(np.float32)
  return {
    "inputs": ids[:, :-1],
    "targets": ids[:, 1:],
    "segments": segments,
    "positions": positions,
    "weights": weights,
  }


def keeping_gradients():
  """Passes gradients on, and keeps them as its state."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (updates, updates),
  )


def start(spread, made, params, specs, **changes):
  """The step under a spread, and its first state."""
  tx = optax.chain(keeping_gradients(), optax.adamw(1e-3, weight_decay=0.01))
  paths = trained(params, specs)
  key = jax.random.key(1)
  state, frozen, shardings = state_lib.place(
    made, params, specs, paths, tx, key, spread
  )
  loss = train_config.TrainConfig(num_steps=NUM_STEPS).make_loss()
  step = step_lib.make(
    made,
    loss,
    tx,
    lambda step: 1e-3,
    frozen,
    shardings,
    specs=specs,
    spread=spread,
    **changes,
  )
  return step, state


def train(spread, made, params, specs, num_steps=NUM_STEPS, **changes):
  """Some steps: `(losses, first gradients, parameters, last state)`, on the host."""
  step, state = start(spread, made, params, specs, **changes)
  losses, gradients = [], None
  for n in range(num_steps):
    state, metrics = step(state, step.put(batch(n)))
    losses.append(float(metrics["loss"]))
    if gradients is None:
      gradients = jax.device_get(state.opt_state[0])
  assert step.num_compilations() == 1
  return losses, gradients, jax.device_get(state.params), state


@functools.cache
def on_one_device(name, kind=None, micro_batches=1):
  """What every preset must repeat."""
  spread = spread_lib.over("dp", num_devices=1)
  return train(spread, *model(name, kind), micro_batches=micro_batches)


def check(spread, name, kind=None, micro_batches=1, **changes):
  """Trains like one device, under a spread; returns the last state."""
  changes.setdefault("micro_batches", micro_batches)
  losses, gradients, params, state = train(spread, *model(name, kind), **changes)
  wanted = on_one_device(name, kind, micro_batches)
  assert_close(losses[0], wanted[0][0], 1e-5)
  assert_close(gradients, wanted[1], 1e-5)
  assert_close(params, wanted[2], 1e-4)
  return state


def assert_close(got, wanted, tolerance):
  """max|a - b| <= tolerance * max(1, max|b|), leaf by leaf."""

  def close(path, a, b):
    limit = tolerance * max(1.0, float(np.max(np.abs(b))))
    worst = float(np.max(np.abs(np.asarray(a) - np.asarray(b))))
    assert worst <= limit, f"{jax.tree_util.keystr(path)}: {worst} > {limit}"

  jax.tree_util.tree_map_with_path(close, got, wanted)


def trained(params, specs):
  """Adapters if there are any, else everything that can be trained."""
  paths = adapters.trained(params, specs, select.Where())
  fixed = {
    path
    for path, leaf in tree_lib.flatten(params).items()
    if isinstance(leaf, quantized.Quantized)
  }
  return frozenset(paths) - fixed
