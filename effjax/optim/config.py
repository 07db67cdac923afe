"""The optimizer section of a config, and the transformation it stands for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from effjax.core import config as config_lib
from effjax.core import registry
from effjax.optim import base, masking, sparsity

OPTIMIZERS = "effjax.optim.optimizers"
SCHEDULES = "effjax.optim.schedules"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """How parameters are updated.

  Attributes:
    name: an optimizer of `effjax list optimizers`.
    learning_rate: peak of the schedule; its right size depends on the optimizer.
    schedule: a schedule of `effjax list schedules`.
    schedule_options: fields of the schedule's options.
    options: fields of the optimizer's options.
    clip_norm: largest global norm of the gradients, or None to leave them alone.
    balance_rate: step of the biases that balance experts without a loss, whatever the
      optimizer and its schedule.

  Raises:
    InputError: a name, an option or a range is wrong.
  """

  name: str = "adamw"
  learning_rate: float = 1e-3
  schedule: str = "warmup_cosine"
  schedule_options: dict[str, Any] = dataclasses.field(default_factory=dict)
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  clip_norm: float | None = 1.0
  balance_rate: float = 1e-3

  def __post_init__(self):
    config_lib.require(
      self.learning_rate > 0,
      f"learning_rate must be positive, got {self.learning_rate}",
    )
    config_lib.require(
      self.clip_norm is None or self.clip_norm > 0,
      f"clip_norm must be positive or None, got {self.clip_norm}",
    )
    config_lib.require(
      self.balance_rate >= 0,
      f"balance_rate must not be negative, got {self.balance_rate}",
    )
    _optimizer(self).options(self.options)
    _schedule(self).options(self.schedule_options)


def learning_rate(config: OptimizerConfig, num_steps: int) -> base.Schedule:
  """The rate of each of `num_steps` updates; the first is update 0.

  Raises:
    InputError: the schedule does not fit into `num_steps`.
  """
  config_lib.require(num_steps > 0, f"num_steps must be positive, got {num_steps}")
  technique = _schedule(config)
  options = technique.options(config.schedule_options)
  return technique.make(config.learning_rate, num_steps, options)


def build(
  config: OptimizerConfig,
  specs: Mapping[str, Any],
  num_steps: int,
  masks: Mapping[str, Any] | None = None,
  sparsifier: sparsity.Sparsifier | None = None,
) -> tuple[optax.GradientTransformation, base.Schedule]:
  """The update rule: clip, optimizer with its schedule, balancing, sparsity, masks.

  Args:
    config: validated config.
    specs: tree of the parameters' ParamSpecs. The parameters may have holes (`None`)
      where it has specs.
    num_steps: how many updates the schedule spans.
    masks: what a pruned model keeps; see `masking.keep_masks`.
    sparsifier: what makes other parameters sparse; None for nothing.

  Returns:
    The transformation, and the learning rate as a function of the step, for logging.

  Raises:
    InputError: the schedule does not fit into `num_steps`.
  """
  rate = learning_rate(config, num_steps)
  technique = _optimizer(config)
  by_update = rate if sparsifier is None else sparsifier.rate(rate)
  tx = technique.make(by_update, specs, technique.options(config.options))
  if config.clip_norm is not None:
    tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
  tx = _balancing(config.balance_rate, specs, tx)
  if sparsifier is not None:
    tx = sparsifier.wrap(tx)
  if masks is not None:
    tx = masking.keep_masks(masks, tx)
  return tx, rate


def _balancing(
  rate: float, specs: Mapping[str, Any], tx: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`tx`, but for parameters of kind "balance": they step by the sign alone."""
  labels = jax.tree.map(
    lambda spec: "balance" if spec.kind == "balance" else "rest", specs
  )
  if "balance" not in jax.tree.leaves(labels):
    return tx
  sign = optax.chain(optax.scale_by_sign(), optax.scale(-rate))
  return optax.partition({"rest": tx, "balance": sign}, labels)


def _optimizer(config: OptimizerConfig) -> base.OptimizerTechnique:
  return registry.find(OPTIMIZERS, config.name, "optimizer")


def _schedule(config: OptimizerConfig) -> base.ScheduleTechnique:
  return registry.find(SCHEDULES, config.schedule, "schedule")
