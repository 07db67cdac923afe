"""How every stage of a recipe is measured."""

import dataclasses

from effjax.core import config

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
    config.require(
      self.xz_preset in PRESETS, f"xz_preset must be 0 to 9, got {self.xz_preset}"
    )

  @property
  def needed_len(self) -> int:
    """Tokens a row holds when latency is measured: prompt, warm-up and timed ones."""
    return self.prompt_tokens + self.warmup_tokens + self.decode_tokens
