"""One row of the results table: a stage, measured."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effjax.measure import bytes as bytes_lib
from effjax.measure import config as config_lib
from effjax.measure import device, flops, latency, leaves, quality, tasks
from effjax.models import encoder
from effjax.parallel import spread as spread_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """What the runner knows of a stage and the ruler does not.

  Attributes:
    name: the stage's name in the recipe.
    technique: registry key of what it did.
    after: name of the stage it started from, or None for the first.
    num_weights: logical parameters of the model before any compression (count).
    seed: of the recipe.
    corpus: name and hash of the corpus.
    stage_secs: wall time the stage took, without measuring it, or None.
    peak_memory_bytes: of the stage (see measure.memory), or None.
    simulated: what the parameters only pretend to save beyond what their leaf kinds
      say, such as plain arrays rounded to few bits: any of "bytes", "flops".
  """

  name: str
  technique: str
  after: str | None
  num_weights: int
  seed: int
  corpus: str
  stage_secs: float | None = None
  peak_memory_bytes: int | None = None
  simulated: Sequence[str] = ()


def measure_stage(
  model: Any,
  params: Mapping[str, Any],
  eval_set: quality.EvalSet | None,
  config: config_lib.MeasureConfig,
  stage: Stage,
  questions: tasks.Questions | None = None,
  spread: spread_lib.Spread | None = None,
  pause: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Measures a model and returns its row, of plain JSON types.

  Several processes do this together; their times are their own.

  Args:
    model: a Decoder or Encoder.
    params: its parameters, of any leaf kinds.
    eval_set: text it is scored on, see `measure_quality`.
    config: how it is measured.
    stage: what it comes from.
    questions: what it is asked; without both the quality is left out.
    spread, pause: see quality.evaluate.
  """
  timed = None
  batch_size = config.eval_batch_size
  scored = measure_quality(
    model, params, eval_set, questions, batch_size, spread, pause
  )
  if config.latency:
    timed = latency.measure(model, params, config, stage.seed)
  counted = flops.per_token(model, params, config.prompt_tokens)
  return {
    "stage": stage.name,
    "technique": stage.technique,
    "after": stage.after,
    "quality": scored or None,
    "num_params": bytes_lib.num_params(params),
    "num_nonzero": bytes_lib.num_nonzero(params),
    "bits_per_weight": bytes_lib.bits_per_weight(params, stage.num_weights),
    "bytes_held": bytes_lib.held_bytes(params),
    "bytes_on_disk": bytes_lib.bytes_on_disk(params),
    "flops_per_token": counted.theoretical,
    "flops_executed_per_token": counted.executed,
    "prefill_ms": timed and timed.prefill_ms,
    "decode_ms_p50": timed and timed.decode_ms_p50,
    "decode_ms_p90": timed and timed.decode_ms_p90,
    "tokens_per_sec": timed and timed.tokens_per_sec,
    "peak_memory_bytes": stage.peak_memory_bytes,
    "stage_secs": stage.stage_secs,
    "simulated": sorted({*leaves.simulated(params), *stage.simulated}),
    "batch": config.batch,
    "prompt_tokens": config.prompt_tokens,
    "decode_tokens": config.decode_tokens,
    "device": device.describe(),
    "seed": stage.seed,
    "corpus": stage.corpus,
  }


def measure_quality(
  model: Any,
  params: Mapping[str, Any],
  eval_set: quality.EvalSet | None,
  questions: tasks.Questions | None,
  batch_size: int,
  spread: spread_lib.Spread | None = None,
  pause: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Everything that says how good a model is; empty where nothing is asked.

  Args:
    model: a Decoder or Encoder.
    params: its parameters, of any leaf kinds.
    eval_set: text that a decoder is scored on; an encoder gives it no probability.
    questions: a task.
    batch_size: rows of a batch.
    spread, pause: see quality.evaluate.
  """
  found = {}
  if eval_set is not None and not isinstance(model, encoder.Encoder):
    found |= quality.evaluate(
      model, params, eval_set, batch_size, spread=spread, pause=pause
    )
  if questions is not None:
    found |= questions.quality(model, params, batch_size)
  return found
