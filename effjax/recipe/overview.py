"""A config as numbers, before anything runs: parameters, FLOPs, bytes, sharding."""

from typing import Any

import jax
import numpy as np

from effjax.core import config as core_config
from effjax.core import registry
from effjax.core import tree as tree_lib
from effjax.measure import flops
from effjax.models import config as model_config
from effjax.models import encoder
from effjax.nn.mlps import moe
from effjax.ops.attention import api as attention_ops
from effjax.ops.moe import grouped
from effjax.recipe import plan as plan_lib
from effjax.recipe import sharing

# A training step costs a forward pass and, for gradients, about two more.
_PASSES = 3


def describe(plan: plan_lib.Plan) -> dict[str, Any]:
  """Plain JSON values about a plan.

  Returns:
    `config` (resolved), `mesh`, `notes` on it (see sharing.notes), `parameters` (path,
    shape, kind, axes, sharding, num_params each), `stages` (what each holds),
    `num_params`, `flops_per_token` (forward, at the training length) and
    `train_flops_per_token`, and `attention` (mixer, layers, implementation, because)
    and `experts` (layers, dispatch, product, because), for training on the device at
    hand.

  Raises:
    InputError: a layer names an implementation of attention that cannot do it.
  """
  config = plan.config
  specs = tree_lib.flatten(plan.specs)
  shardings = tree_lib.flatten(plan.shardings(plan.fresh))
  num_params = plan.num_params
  length = config.data.sequence_length
  forward = flops.per_token(plan.model, plan.fresh, length).executed
  return {
    "config": core_config.to_dict(config),
    "mesh": _mesh(plan.spread.mesh),
    "notes": sharing.notes(plan),
    "parameters": [
      {
        "path": path,
        "shape": list(spec.shape),
        "kind": spec.kind,
        "axes": " ".join(spec.all_axes),
        "sharding": _sharding(shardings[path]),
        "num_params": spec.size,
      }
      for path, spec in specs.items()
    ],
    "stages": [_stage(plan, i, num_params) for i in range(len(config.stages))],
    "num_params": num_params,
    "flops_per_token": forward,
    "train_flops_per_token": _PASSES * forward,
    "attention": _attention(plan),
    "experts": _experts(plan),
  }


def _attention(plan: plan_lib.Plan) -> list[dict[str, Any]]:
  """Which implementation the layers with attention run in training, and why."""
  model, data = plan.model, plan.config.data
  causal = not isinstance(model, encoder.Encoder)
  found: dict[tuple[str, str, str], list[int]] = {}
  for index, layer in enumerate(model.config.layers):
    technique = registry.find(model_config.MIXERS, layer.mixer)
    if not hasattr(technique, "attention_problem"):
      continue
    options = layer.build_mixer_options()
    mixer = technique(options, model.config.embed_dim, causal=causal)
    with plan.spread.active():
      problem = mixer.attention_problem(
        data.batch_size, data.sequence_length, model.precision.dtype
      )
    choice = attention_ops.explain(mixer.options.implementation, problem)
    found.setdefault((layer.mixer, *choice), []).append(index)
  return [
    {
      "mixer": mixer,
      "layers": _numbers(layers, model.config.share),
      "implementation": name,
      "because": reason,
    }
    for (mixer, name, reason), layers in found.items()
  ]


def _experts(plan: plan_lib.Plan) -> list[dict[str, Any]]:
  """How the layers with experts bring tokens to them, and what multiplies."""
  config = plan.model.config
  found: dict[tuple[str, str, str], list[int]] = {}
  for index, layer in enumerate(config.layers):
    options = layer.build_mlp_options()
    if not isinstance(options, moe.MoEOptions):
      continue
    dispatch, product = options.dispatch, ("batched", "all experts have as many rows")
    if options.router == "expert_choice":
      dispatch = options.router
    elif dispatch == "dropless":
      product = grouped.choose(jax.default_backend(), plan.model.precision.dtype)
    found.setdefault((dispatch, *product), []).append(index)
  return [
    {
      "layers": _numbers(layers, config.share),
      "dispatch": dispatch,
      "product": product,
      "because": reason,
    }
    for (dispatch, product, reason), layers in found.items()
  ]


def _numbers(sets: list[int], share: int) -> str:
  """The layers that these sets of parameters make."""
  return ", ".join(str(share * k + j) for k in sets for j in range(share))


def _stage(plan: plan_lib.Plan, index: int, num_params: int) -> dict[str, Any]:
  stage, parent = plan.config.stages[index], plan.config.parent(index)
  made = plan.outcomes[index]
  tree = made.params
  held, on_device = 0, 0
  shardings = jax.tree.leaves(plan.shardings(tree, made.specs))
  for array, sharding in zip(jax.tree.leaves(tree), shardings, strict=True):
    shard = sharding.shard_shape(array.shape)
    held += array.size * array.dtype.itemsize
    on_device += int(np.prod(shard)) * array.dtype.itemsize
  return {
    "stage": stage.name,
    "technique": stage.technique,
    "after": None if parent is None else plan.config.stages[parent].name,
    "bytes_held": held,
    "bytes_per_device": on_device,
    "bits_per_weight": 8 * held / num_params,
  }


def _mesh(mesh: Any) -> str:
  """The axes that split anything."""
  split = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
  return ", ".join(split) or "one device"


def _sharding(sharding: Any) -> str:
  return " ".join(str(entry) for entry in sharding.spec) or "replicated"
