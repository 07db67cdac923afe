"""The train step of a model for devices that need not be there, from shapes alone."""

from typing import Any

import jax

from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.optim import config as optim_config
from effjax.parallel import spread as spread_lib
from effjax.train import config as train_config
from effjax.train import state as state_lib
from effjax.train import step as step_lib


def lower(
  model: Any,
  spread: spread_lib.Spread,
  config: train_config.TrainConfig,
  *,
  batch_size: int,
  length: int,
) -> jax.stages.Lowered:
  """The step that `loop.train` would run on every parameter, ready to be compiled.

  Args:
    model: the model.
    spread: the devices (see also topology.spread), and what lies where.
    config: of the training; its optimizer, micro-batches, loss and precision count.
    batch_size: sequences of a batch, over all devices.
    length: tokens of each.

  Raises:
    InputError: the model or the batch do not fit the devices.
  """
  specs = specs_lib.specs(model)
  shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
  paths = frozenset(tree_lib.flatten(shapes))
  tx, lr_fn = optim_config.build(config.optimizer, specs, config.num_steps)
  laid = state_lib.lay_out(model, shapes, specs, paths, tx, spread)
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
  )
  return step.lower(state, batch_size, length)
