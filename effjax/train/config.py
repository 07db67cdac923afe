"""The options of the recipe technique "train": one stage of training."""

import dataclasses
from typing import Any

from effjax.core import config as config_lib
from effjax.core import precision as precision_lib
from effjax.core import registry
from effjax.optim import config as optim_config
from effjax.optim import sparsity as sparsity_lib
from effjax.train.losses import base

LOSSES = "effjax.train.losses"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How a stage trains, a first training and a fine-tuning alike.

  What trains is the stage's `where`. Counts of steps are updates of the parameters.

  Attributes:
    num_steps: updates; fixed here, never by the clock.
    optimizer: see OptimizerConfig.
    sparsity: see SparsityConfig; what it made sparse is handed on masked. None trains
      densely, or under the masks that parameters came with.
    loss: a loss of effjax.train.losses.
    loss_options: fields of the loss's options.
    teacher: name of the earlier stage whose model the loss learns from, such as the
      full-precision model for its quantized copy; for the losses that need one.
    micro_batches: parts a batch is cut into, whose gradients are summed; memory falls,
      the result stays the same up to rounding.
    precision: compute dtype and precision of products.
    eval_every: steps between evaluations; 0 for one at the end.
    eval_max_bytes: how much validation text an evaluation reads (bytes); None for all.
    checkpoint_every: steps between checkpoints; 0 for one at the end.
    keep_checkpoints: how many are kept.
    log_every: steps between lines of the log.
    seed_offset: added to the recipe's seed for this stage's noise.
    batch_size: sequences a step, or None for the data's own.
    sequence_length: tokens a sequence, or None for the data's own.
  """

  num_steps: int
  optimizer: optim_config.OptimizerConfig = optim_config.OptimizerConfig()
  sparsity: sparsity_lib.SparsityConfig | None = None
  loss: str = "cross_entropy"
  loss_options: dict[str, Any] = dataclasses.field(default_factory=dict)
  teacher: str | None = None
  micro_batches: int = 1
  precision: precision_lib.PrecisionConfig = precision_lib.PrecisionConfig()
  eval_every: int = 0
  eval_max_bytes: int | None = None
  checkpoint_every: int = 200
  keep_checkpoints: int = 2
  log_every: int = 10
  seed_offset: int = 0
  batch_size: int | None = None
  sequence_length: int | None = None

  def __post_init__(self):
    for name in ("num_steps", "micro_batches", "keep_checkpoints", "log_every"):
      value = getattr(self, name)
      config_lib.require(value > 0, f"{name} must be positive, got {value}")
    for name in ("eval_every", "checkpoint_every", "seed_offset"):
      value = getattr(self, name)
      config_lib.require(value >= 0, f"{name} must not be negative, got {value}")
    for name in ("eval_max_bytes", "batch_size", "sequence_length"):
      value = getattr(self, name)
      config_lib.require(
        value is None or value > 0, f"{name} must be positive or None, got {value}"
      )
    config_lib.require(
      self.batch_size is None or self.batch_size % self.micro_batches == 0,
      f"batch_size={self.batch_size} is no multiple of "
      f"micro_batches={self.micro_batches}",
    )
    config_lib.require(
      self.precision.compute != "float16",
      "precision.compute='float16' cannot train: small gradients vanish without loss "
      "scaling; use 'bfloat16'",
    )
    self._check_teacher()
    # Wrong options and a schedule that does not fit are found before anything runs.
    self.make_loss()
    optim_config.learning_rate(self.optimizer, self.num_steps)
    if self.sparsity is not None:
      self.sparsity.check_fits(self.num_steps)

  def make_loss(self) -> base.LossFn:
    """The loss function these options name."""
    return self._loss.make(self._loss.options(self.loss_options))

  @property
  def _loss(self) -> base.LossTechnique:
    return registry.find(LOSSES, self.loss, "loss")

  def _check_teacher(self) -> None:
    if self._loss.needs_teacher:
      config_lib.require(
        self.teacher is not None,
        f"loss={self.loss!r} needs a teacher: set teacher to the name of an earlier "
        "stage",
      )
      return
    find = lambda name: registry.find(LOSSES, name, "loss")
    takers = [name for name in registry.names(LOSSES) if find(name).needs_teacher]
    config_lib.require(
      self.teacher is None,
      f"teacher={self.teacher!r}: loss={self.loss!r} takes none; leave it out, or "
      f"choose a loss that does: {', '.join(takers)}",
    )

  def evaluates_at(self, step: int) -> bool:
    """Whether the model is evaluated after `step` updates."""
    return step == self.num_steps or bool(
      self.eval_every and step and step % self.eval_every == 0
    )

  def saves_at(self, step: int) -> bool:
    """Whether a checkpoint is written after `step` updates."""
    return step == self.num_steps or bool(
      self.checkpoint_every and step and step % self.checkpoint_every == 0
    )

  def logs_at(self, step: int) -> bool:
    """Whether the metrics of update number `step` are written."""
    return step == self.num_steps or step % self.log_every == 0
