"""The train step of a model for devices that need not be there, from shapes alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from effjax.core import config as config_lib
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.optim import config as optim_config
from effjax.parallel import sharding
from effjax.parallel import spread as spread_lib
from effjax.train import config as train_config
from effjax.train import masks
from effjax.train import state as state_lib
from effjax.train import step as step_lib
from effjax.train.losses import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
  """What a training needs to know of what it trains; arrays may be shapes.

  Attributes:
    model: the model.
    params: its parameters.
    specs: tree of its ParamSpecs.
    paths: which of them train.
    teacher: what the loss learns from, if it needs one.
  """

  model: Any
  params: Mapping[str, Any]
  specs: Mapping[str, Any]
  paths: frozenset[str]
  teacher: base.Teacher | None = None


def of_model(model: Any) -> Training:
  """All parameters of a model, freshly initialized."""
  specs = specs_lib.specs(model)
  shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
  paths = frozenset(tree_lib.flatten(shapes))
  return Training(model=model, params=shapes, specs=specs, paths=paths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
  """A training, and the shape of its batches; on which devices is said later.

  Attributes:
    training: what is trained.
    config: its optimizer, micro-batches, loss and precision count.
    batch_size: sequences of a batch, over all devices.
    length: tokens of each.
  """

  training: Training
  config: train_config.TrainConfig
  batch_size: int
  length: int

  def lower(self, spread: spread_lib.Spread) -> jax.stages.Lowered:
    """The step that `loop.train` would run, ready to be compiled.

    Args:
      spread: the devices (see also topology.spread), and what lies where.

    Raises:
      InputError: see `check`.
    """
    step, state = self._step(spread)
    return step.fn.lower(state, step.fixed, self._batch(step))

  def held_bytes(self, spread: spread_lib.Spread) -> dict[str, int]:
    """Bytes that a device holds before a step, without padding.

    Returns:
      "params" (trained or not), "optimizer", and "batch" with everything else.
    """
    step, state = self._step(spread)
    other = (state.step, state.collections, state.key_data, self._batch(step))
    return {
      "params": sharding.held_bytes((state.params, step.fixed)),
      "optimizer": sharding.held_bytes(state.opt_state),
      "batch": sharding.held_bytes(other),
    }

  def shapes(
    self, spread: spread_lib.Spread
  ) -> tuple[state_lib.TrainState, dict[str, Any]]:
    """The first state, and what stays as it is (see step.Step.fixed), as shapes."""
    step, state = self._step(spread)
    return state, step.fixed

  def check(self, spread: spread_lib.Spread) -> None:
    """Traces the step, so that what devices cannot share shows before anything is made.

    Raises:
      InputError: a large array would be replicated, or rows, tokens, layers, heads or
        experts do not divide, or the model cannot be split so.
    """
    parts = self.config.micro_batches * spread.batch_ways
    config_lib.require(
      self.batch_size % parts == 0,
      f"a batch of {self.batch_size} sequences does not divide into micro_batches="
      f"{self.config.micro_batches} for {spread.batch_ways} devices along "
      f"{', '.join(spread.batch_axes) or 'none'}; make batch_size a multiple of "
      f"{parts}, or use fewer devices (mesh.num_devices)",
    )
    step, state = self._step(spread)
    jax.eval_shape(step.fn, state, step.fixed, self._batch(step))

  def _batch(self, step: step_lib.Step) -> Any:
    return step.shapes(self.batch_size, self.length)

  def _step(
    self, spread: spread_lib.Spread
  ) -> tuple[step_lib.Step, state_lib.TrainState]:
    """The step and its first state, of shapes."""
    training, config = self.training, self.config
    model, specs, paths = training.model, training.specs, training.paths
    tx, lr_fn = optim_config.build(config.optimizer, specs, config.num_steps)
    plain = jax.eval_shape(lambda p: masks.take_out(p, paths)[0], dict(training.params))
    laid = state_lib.lay_out(model, plain, specs, paths, tx, spread)
    state, frozen = laid.abstract()
    step = step_lib.make(
      model,
      config.make_loss(),
      tx,
      lr_fn,
      frozen,
      laid.shardings,
      specs=specs,
      spread=spread,
      micro_batches=config.micro_batches,
      policy=config.precision,
      teacher=training.teacher,
    )
    return step, state
