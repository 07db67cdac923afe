"""A recipe played through on shapes: mistakes show before anything compiles.

Every transform is traced on the tree its stage will start from, so a selection that
matches nothing, a group that does not divide or a weight pruned twice is found here,
together with anything the mesh cannot split.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import api as compress
from effjax.compress import registry as transforms
from effjax.core import errors
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.data import pipeline
from effjax.data.tasks import base
from effjax.interop import exports
from effjax.models import api as models
from effjax.models import encoder_config
from effjax.optim import sparsity
from effjax.parallel import spread as spread_lib
from effjax.recipe import config as config_lib
from effjax.recipe import rewinding
from effjax.train import adapters, lowering, masks
from effjax.train import state as state_lib
from effjax.train.losses import base as losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What a stage will make.

  Attributes:
    model: the model; the plan's own unless the stage changes it.
    specs: tree of the ParamSpecs of its parameters.
    params: its parameters, of ShapeDtypeStructs.
  """

  model: Any
  specs: Mapping[str, Any]
  params: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a run will do.

  Attributes:
    config: the root config.
    model: the model, at the precision it is measured with.
    specs: tree of the ParamSpecs of its parameters.
    fresh: the freshly initialized tree, of ShapeDtypeStructs.
    spread: the devices, and what lies where.
    outcomes: for each stage, what it makes.
  """

  config: config_lib.Config
  model: Any
  specs: Mapping[str, Any]
  fresh: Mapping[str, Any]
  spread: spread_lib.Spread
  outcomes: tuple[Outcome, ...]

  def start(self, index: int) -> Outcome:
    """What a stage starts from."""
    parent = self.config.parent(index)
    first = Outcome(model=self.model, specs=self.specs, params=self.fresh)
    return first if parent is None else self.outcomes[parent]

  def steps(self, index: int) -> lowering.Steps:
    """What a stage that trains does, step by step."""
    stage, start = self.config.stages[index], self.start(index)
    options, data = stage.build_options(), self.config.data
    teacher = self.config.teacher(index)
    if teacher is not None:
      made = self.outcomes[teacher]
      teacher = losses.Teacher(made.model, made.params)
    training = lowering.Training(
      model=start.model.clone(precision=options.precision),
      params=start.params,
      specs=start.specs,
      paths=adapters.trained(start.params, start.specs, stage.build_where()),
      teacher=teacher,
    )
    return lowering.Steps(
      training=training,
      config=options,
      batch_size=options.batch_size or data.batch_size,
      length=options.sequence_length or data.sequence_length,
    )

  @property
  def num_params(self) -> int:
    """Logical parameters of the model before any compression."""
    return sum(spec.size for spec in tree_lib.flatten(self.specs).values())

  def shardings(
    self, tree: Mapping[str, Any], specs: Mapping[str, Any] | None = None
  ) -> dict[str, Any]:
    """NamedShardings of a parameter tree of this run, for any leaf kinds.

    Args:
      tree: the parameters, or their shapes.
      specs: their ParamSpecs; None for those of the plan's own model.
    """
    return self.spread.params(self.specs if specs is None else specs, tree)


def make(config: config_lib.Config, spread: spread_lib.Spread | None = None) -> Plan:
  """Plays the recipe through on shapes; computes, compiles and writes nothing.

  Args:
    config: the root config.
    spread: over devices that need not be there; over those at hand by default.

  Raises:
    InputError: something does not fit; the message names the stage.
  """
  _check_measures(config)
  pipeline.check(config.data)
  spread = spread or spread_lib.make(config.mesh)
  model = models.build(config.model)
  specs = specs_lib.specs(model)
  fresh = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
  plan = Plan(
    config=config, model=model, specs=specs, fresh=fresh, spread=spread, outcomes=()
  )
  first = Outcome(model=model, specs=specs, params=fresh)
  outcomes: list[Outcome] = []
  for i, stage in enumerate(config.stages):
    start = plan.start(i)
    with _naming(i, stage.name):
      if (teacher := config.teacher(i)) is not None:
        _check_teacher(outcomes[teacher].model, start.model)
      if stage.technique == config_lib.REWIND:
        named = dict(zip([s.name for s in config.stages], outcomes, strict=False))
        made = _rewound(start, named.get(stage.options["to"], first))
      else:
        made = _outcome(plan, stage, start)
      plan.shardings(made.params, made.specs)
    outcomes.append(made)
    plan = dataclasses.replace(plan, outcomes=tuple(outcomes))
    if stage.technique == config_lib.TRAIN and spread.mesh.size > 1:
      with _naming(i, stage.name):
        plan.steps(i).check(spread)
  return plan


def _check_measures(config: config_lib.Config) -> None:
  """Raises InputError if the quality of a stage could not be measured."""
  task = config.measure.task
  if task is not None and config.data.tokenizer == "ids":
    raise errors.InputError(
      f"config.measure.task: {task} is text, which a model of token ids "
      "(data.tokenizer='ids') cannot read; leave the task out"
    )
  if not isinstance(config.model, encoder_config.EncoderConfig):
    return
  for i, stage in enumerate(config.stages):
    if stage.technique == config_lib.TRAIN:
      raise errors.InputError(
        f"config.stages[{i}] ({stage.name}): 'train' trains language models, and "
        "config.model is an encoder; import one (technique 'import') and compress it"
      )
  if task is None:
    raise errors.InputError(
      "config.measure.task is missing: an encoder gives texts no probability, and is "
      f"measured by a task ({', '.join(base.names())})"
    )


def _check_teacher(teacher: Any, student: Any) -> None:
  """Raises InputError if one's logits mean nothing to the other."""
  sizes = [model.config.vocab_size for model in (teacher, student)]
  if sizes[0] != sizes[1]:
    raise errors.InputError(
      f"the teacher has a vocabulary of {sizes[0]}, the student of {sizes[1]}: choose "
      "a teacher with the same"
    )


def _outcome(plan: Plan, stage: config_lib.StageConfig, start: Outcome) -> Outcome:
  """What a stage makes of what it starts from."""
  where = stage.build_where()
  if stage.technique == config_lib.IMPORT:
    kept = plan.config.source.abstract(stage.build_options().kept_dtype)
    return dataclasses.replace(start, params=kept)
  if stage.technique == config_lib.EXPORT:
    exports.check(stage.build_options(), start.model, start.params, start.specs)
    return start
  if stage.technique == config_lib.TRAIN:
    paths = adapters.trained(start.params, start.specs, where)
    return dataclasses.replace(start, params=_trained(stage, start, paths))
  model, params = compress.shapes(
    transforms.find(stage.technique),
    start.model,
    start.params,
    start.specs,
    where=where,
    options=stage.build_options(),
    order=stage.calibration.order,
  )
  specs = compress.specs_of(start.model, model, start.specs)
  return Outcome(model=model, specs=specs, params=params)


def _rewound(start: Outcome, to: Outcome) -> Outcome:
  """What a rewind makes, of shapes."""
  params = jax.eval_shape(rewinding.rewound, start.params, to.params)
  return dataclasses.replace(start, params=params)


def _trained(
  stage: config_lib.StageConfig, start: Outcome, paths: frozenset[str]
) -> dict[str, Any]:
  """The parameters that a training hands on, of ShapeDtypeStructs."""
  config = stage.build_options().sparsity
  made_sparse = {}
  if config is not None:
    made_sparse = sparsity.choose(config, start.params, start.specs, paths).shapes

  def hand_on(params):
    plain, kept = masks.take_out(params, paths)
    state_lib.split(plain, paths)
    found = {path: jnp.ones(shape, bool) for path, shape in made_sparse.items()}
    return masks.put_back(plain, masks.join(kept, found, plain), params)

  return jax.eval_shape(hand_on, start.params)


@contextlib.contextmanager
def _naming(index: int, name: str) -> Iterator[None]:
  try:
    yield
  except errors.InputError as error:
    raise errors.InputError(f"config.stages[{index}] ({name}): {error}") from None
