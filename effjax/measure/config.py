"""How every stage of a recipe is measured."""

import dataclasses

from effjax.core import config, errors
from effjax.data.tasks import base

PRESETS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureConfig:
  """What is measured after a stage, and how.

  Attributes:
    prompt_tokens: length of the prompt that is prefilled (tokens).
    decode_tokens: tokens decoded one at a time, each of them timed.
    warmup_tokens: tokens decoded first, not timed.
    prefill_repeats: timed prefills; the median counts.
    batch: rows prefilled and decoded together.
    eval_batch_size: rows of a batch when the validation text is scored.
    latency: whether to time anything; the fields are null otherwise.
    task: key of `effjax list tasks`: labelled text that every stage answers too, a
      language model by log-likelihood, an encoder through a probe; None for no task.
    task_limit: how many of its examples are taken; None for all.
    xz_preset: effort of xz primed with the training text, 0 to 9; each level costs
      more time, and 9 is also the extreme form.
  """

  prompt_tokens: int = 128
  decode_tokens: int = 64
  warmup_tokens: int = 8
  prefill_repeats: int = 5
  batch: int = 1
  eval_batch_size: int = 16
  latency: bool = True
  task: str | None = None
  task_limit: int | None = None
  xz_preset: int = 9

  def __post_init__(self):
    for name in (
      "prompt_tokens",
      "decode_tokens",
      "prefill_repeats",
      "batch",
      "eval_batch_size",
    ):
      value = getattr(self, name)
      config.require(value >= 1, f"{name} must be at least 1, got {value}")
    config.require(
      self.warmup_tokens >= 0,
      f"warmup_tokens must not be negative, got {self.warmup_tokens}",
    )
    if self.task is not None and self.task not in base.names():
      raise errors.unknown("task", self.task, base.names())
    config.require(
      self.task_limit is None or (self.task is not None and self.task_limit > 0),
      f"task_limit={self.task_limit} must be positive, and goes with a task",
    )
    config.require(
      self.xz_preset in PRESETS, f"xz_preset must be 0 to 9, got {self.xz_preset}"
    )

  @property
  def needed_len(self) -> int:
    """Tokens a row holds when latency is measured: prompt, warm-up and timed ones."""
    return self.prompt_tokens + self.warmup_tokens + self.decode_tokens
