"""Stages of a recipe compiled for a slice of TPUs: a training's step, or decoding."""

import dataclasses
from typing import Any

from effjax.core import config as core_config
from effjax.core import errors
from effjax.core import precision as precision_lib
from effjax.infer import lowering as serving
from effjax.measure import flops
from effjax.measure.pods import chips, compiled, planned
from effjax.parallel import rules, topology
from effjax.parallel import spread as spread_lib
from effjax.recipe import config as config_lib
from effjax.recipe import plan as plan_lib
from effjax.train import lowering

# A training step costs a forward pass and, for gradients, two more.
_PASSES = 3


def training(
  config: config_lib.Config, topology_name: str, stage: str | None = None
) -> tuple[lowering.Steps, spread_lib.Spread]:
  """What a stage that trains does, and the slice's chips that it is spread over.

  Args:
    config: the root config.
    topology_name: such as "v5e:16x16".
    stage: its name; None for the first that trains.

  Raises:
    InputError: no such stage; the slice is unknown or its chips cannot share the step;
      libtpu is not installed.
  """
  chips.parse(topology_name)
  names = [s.name for s in config.stages if s.technique == config_lib.TRAIN]
  core_config.require(bool(names), "this recipe has no stage that trains")
  if stage is not None and stage not in names:
    raise errors.unknown("training stage", stage, names)
  index = [s.name for s in config.stages].index(stage or names[0])
  spread = _spread(config, topology_name)
  plan = plan_lib.make(_up_to(config, index), spread)
  return plan.steps(index), spread


def _spread(config: config_lib.Config, name: str) -> spread_lib.Spread:
  """The mesh of a recipe over a whole slice, or the part of it that is asked for."""
  spread = topology.spread(name, config.mesh)
  present = chips.parse(name).num_chips
  core_config.require(
    config.mesh.num_devices is not None or spread.mesh.size == present,
    f"mesh.shape {dict(config.mesh.shape)} of preset {config.mesh.preset!r} takes "
    f"{spread.mesh.size} of the {present} chips of {name}: choose sizes whose product "
    f"is {present}, or leave out the one that should take what is left "
    f"({rules.find(config.mesh.preset).main_axis})",
  )
  return spread


def plan_training(
  config: config_lib.Config, topology_name: str, stage: str | None = None
) -> planned.Planned:
  """Compiles the step of a stage that trains; see `training`."""
  steps, spread = training(config, topology_name, stage)
  program = compiled.compiled(steps.lower(spread), topology_name)
  return planned.of(
    program,
    spread,
    chips.parse(topology_name),
    steps.held_bytes(spread),
    model_flops(steps),
  )


def model_flops(steps: lowering.Steps) -> float:
  """Of a step, that the model needs: three times those of a forward pass.

  Attention counts in the blocks that causality, or a window, leaves (measure.flops),
  experts by the tokens that use them, not by their capacity.
  """
  made = steps.training
  model = _dropless(made.model)
  forward = flops.per_token(model, made.params, steps.length).theoretical
  return _PASSES * forward * steps.batch_size * steps.length


def _dropless(model: Any) -> Any:
  """The same model without padded experts."""
  layers = tuple(
    dataclasses.replace(one, mlp_options={**one.mlp_options, "dispatch": "dropless"})
    if one.mlp == "moe"
    else one
    for one in model.config.layers
  )
  return model.clone(config=dataclasses.replace(model.config, layers=layers))


def plan_serving(
  config: config_lib.Config,
  topology_name: str,
  stage: str | None,
  rows: int,
  max_len: int,
) -> dict[str, planned.Planned]:
  """Compiles a prefill and a decoding step of what a stage makes.

  Args:
    config: the root config.
    topology_name: such as "v5e:2x4".
    stage: the stage whose parameters are served; None for the fresh model.
    rows: sequences decoded together.
    max_len: tokens of a prompt, and that a cache can hold.

  Returns:
    "prefill" and "decode".

  Raises:
    InputError: see `training`; the model was trained for shorter sequences.
  """
  slice_ = chips.parse(topology_name)
  limit = config.model.max_len
  core_config.require(
    max_len <= limit,
    f"{max_len} tokens are more than model.max_len={limit}; ask for fewer, or set it",
  )
  names = [s.name for s in config.stages]
  if stage is not None and stage not in names:
    raise errors.unknown("stage", stage, names)
  spread = _spread(config, topology_name)
  index = -1 if stage is None else names.index(stage)
  plan = plan_lib.make(_up_to(config, index), spread)
  made = plan.start(0) if stage is None else plan.outcomes[index]
  compute = _precision(config)
  served = serving.Serving(
    model=made.model.clone(precision=compute),
    params=made.params,
    rows=rows,
    max_len=max_len,
  )
  arguments = served.held_bytes(spread)
  model = _dropless(made.model)
  per_token = flops.per_token(model, made.params, max_len).theoretical
  prefill, step = (
    compiled.compiled(program, topology_name) for program in served.lower(spread)
  )
  needed = {"prefill": per_token * rows * max_len, "decode": None}
  return {
    name: planned.of(program, spread, slice_, arguments, needed[name])
    for name, program in (("prefill", prefill), ("decode", step))
  }


def _precision(config: config_lib.Config) -> precision_lib.PrecisionConfig:
  """What the recipe trains in; bfloat16 if it trains nothing."""
  for stage in config.stages:
    if stage.technique == config_lib.TRAIN:
      return stage.build_options().precision
  return precision_lib.PrecisionConfig(compute="bfloat16")


def _up_to(config: config_lib.Config, index: int) -> config_lib.Config:
  """The recipe without the stages after one, which need not be played through."""
  stages = config.stages[: max(index, 0) + 1]
  return dataclasses.replace(config, stages=stages)
