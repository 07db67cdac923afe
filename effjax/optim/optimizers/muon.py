"""Orthogonalised momentum for matrices, AdamW for everything else.

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon) for the update, Liu et
al. 2025 (arXiv 2502.16982) for the weight decay and the scale "rms":

    m <- momentum * m + (1 - momentum) * g
    theta <- theta - lr * (scale * NS(momentum * m + (1 - momentum) * g)
                           + weight_decay * theta)

NS is five steps of the quintic Newton-Schulz iteration (effjax.optim.newton_schulz).
Scaling the momentum changes nothing, so it needs no bias correction (optax's
`contrib.muon` has one, which differs slightly under Nesterov's form). Parameters of
kind "matrix", `[*stack, in, out]`, are orthogonalised matrix by matrix, in one batched
product over the stack; embeddings, convolutions, norms, biases, step sizes and state
space parameters follow AdamW.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.core import shard
from effjax.core import specs as specs_lib
from effjax.optim import base, checks, newton_schulz

# Axes in which several heads of `ParamSpec.head_dim` are merged.
HEAD_AXES = ("heads", "kv", "inner")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of `muon`; momentum and iteration are Jordan's, the rest is Liu's.

  Attributes:
    momentum: decay of the momentum.
    nesterov: whether the update looks one step ahead.
    ns_steps: iterations of the orthogonalisation.
    ns_dtype: dtype of its products; "auto" is float32 on the CPU, else bfloat16.
    per_head: whether each head of an attention or state space projection is a matrix
      of its own.
    scale: "rms" multiplies by 0.2 sqrt(max(in, out)), so that an update has the size of
      AdamW's and one learning rate serves both; "spectral" by sqrt(max(1, out / in)),
      for rates near 0.02 and a small `adam_scale`.
    weight_decay: per unit of learning rate, for both parts.
    decay_embedding: whether embeddings decay like matrices.
    momentum_dtype: "float32" or "bfloat16"; None for the parameter's.
    adam_scale: AdamW's learning rate as a multiple of Muon's.
    adam_b1: AdamW's decay of the mean of the gradients.
    adam_b2: AdamW's decay of the mean of their squares.
    adam_eps: added to AdamW's root.
  """

  momentum: float = 0.95
  nesterov: bool = True
  ns_steps: int = 5
  ns_dtype: str = "auto"
  per_head: bool = False
  scale: str = "rms"
  weight_decay: float = 0.1
  decay_embedding: bool = True
  momentum_dtype: str | None = None
  adam_scale: float = 1.0
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  adam_eps: float = 1e-8

  def __post_init__(self):
    checks.check_decay_rates(self, "momentum", "adam_b1", "adam_b2")
    checks.check_positive(self, "ns_steps", "adam_scale", "adam_eps")
    checks.check_not_negative(self, "weight_decay")
    checks.check_momentum_dtype(self)
    checks.check_choice(self, "ns_dtype", ("auto", "float32", "bfloat16"))
    checks.check_choice(self, "scale", ("rms", "spectral"))


class MuonState(NamedTuple):
  """The momentum, with the shapes of the parameters."""

  momentum: Any


def make(
  learning_rate: base.Schedule, specs: Mapping[str, Any], options: Options
) -> optax.GradientTransformation:
  """Muon and AdamW; state: one array of a matrix's shape, two of any other's."""
  mask = base.decay_mask(specs, options.decay_embedding)
  decay = optax.add_decayed_weights(options.weight_decay, mask)
  rate = optax.scale_by_learning_rate(learning_rate)
  adam = optax.scale_by_adam(
    b1=options.adam_b1,
    b2=options.adam_b2,
    eps=options.adam_eps,
    mu_dtype=options.momentum_dtype,
  )
  muon = scale_by_muon(specs, options)
  labels = base.labels(
    specs, lambda spec: "muon" if spec.kind == "matrix" else "adamw", "adamw"
  )
  rules = {
    "muon": optax.chain(muon, decay, rate),
    "adamw": optax.chain(adam, decay, optax.scale(options.adam_scale), rate),
  }
  return optax.partition(rules, labels)


def scale_by_muon(
  specs: Mapping[str, Any], options: Options
) -> optax.GradientTransformation:
  """Replaces the gradients of matrices by their scaled orthogonal momentum."""
  beta = options.momentum

  def init_fn(params):
    zeros = lambda p: jnp.zeros_like(p, dtype=options.momentum_dtype)
    return MuonState(jax.tree.map(zeros, params))

  def update_fn(updates, state, params=None):
    del params
    average = lambda m, g: beta * m.astype(g.dtype) + (1.0 - beta) * g
    momentum = jax.tree.map(average, state.momentum, updates)
    ahead = jax.tree.map(average, momentum, updates) if options.nesterov else momentum
    updates = base.map_with_specs(
      lambda spec, x: _orthogonal_update(spec, x, options), specs, ahead
    )
    keep = lambda old, new: new.astype(old.dtype)
    return updates, MuonState(jax.tree.map(keep, state.momentum, momentum))

  return optax.GradientTransformation(init_fn, update_fn)


def _orthogonal_update(
  spec: specs_lib.ParamSpec, x: jax.Array, options: Options
) -> jax.Array:
  """NS(x) times the scale, matrix by matrix or head by head."""
  dtype = options.ns_dtype
  if dtype == "auto":
    dtype = "float32" if shard.platform() == "cpu" else "bfloat16"
  axis = _head_axis(spec, x) if options.per_head else None
  blocks = x if axis is None else _split_heads(x, axis, spec.head_dim)
  size_in, size_out = blocks.shape[-2:]
  if options.scale == "rms":
    scale = 0.2 * math.sqrt(max(size_in, size_out))
  else:
    scale = math.sqrt(max(1.0, size_out / size_in))
  orthogonal = newton_schulz.orthogonalize(blocks, options.ns_steps, dtype)
  update = (scale * orthogonal).astype(x.dtype)
  return update if axis is None else _merge_heads(update, axis)


def _head_axis(spec: specs_lib.ParamSpec, x: jax.Array) -> int | None:
  """The axis (-2 or -1) in which heads are merged, if there is one."""
  if spec.head_dim is None:
    return None
  for axis in (-2, -1):
    # A factor of a matrix has only one of its two sides.
    whole = x.shape[axis] == spec.shape[axis] and x.shape[axis] % spec.head_dim == 0
    if spec.axes[axis] in HEAD_AXES and whole:
      return axis
  return None


def _split_heads(x: jax.Array, axis: int, head_dim: int) -> jax.Array:
  """`[..., in, H * K]` to `[..., H, in, K]`, or `[..., H * K, out]` likewise."""
  axis += x.ndim
  shape = x.shape[:axis] + (-1, head_dim) + x.shape[axis + 1 :]
  return jnp.moveaxis(x.reshape(shape), axis, x.ndim - 2)


def _merge_heads(x: jax.Array, axis: int) -> jax.Array:
  """The inverse of `_split_heads`, for the same `axis`."""
  ndim = x.ndim - 1
  axis += ndim
  x = jnp.moveaxis(x, ndim - 2, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


TECHNIQUE = base.OptimizerTechnique(make, Options)
