"""How good a model is: its loss on fixed validation text, or its right answers.

Bits per byte compares models of any vocabulary, and compressors: the summed negative
log-likelihood of every predicted token, over ln 2 and the UTF-8 bytes of the raw text.
Where only answers are scored there are no bytes; the accuracy takes their place.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.core import errors
from effjax.core import shard as shard_lib
from effjax.models import stack
from effjax.parallel import pipeline
from effjax.parallel import spread as spread_lib


@runtime_checkable
class EvalSet(Protocol):
  """Fixed text, cut into windows that overlap but score every token once.

  Attributes:
    num_bytes: UTF-8 bytes of the raw text; None where only answers are scored.
    context: longest sequence the model sees (tokens).
    stride: tokens by which the windows move on.
  """

  num_bytes: int | None
  context: int
  stride: int

  def batches(self, batch_size: int) -> Iterator[Mapping[str, Any]]:
    """Batches of equal shape; `weights` is 1 where the target is scored."""


def evaluate(
  model: Any,
  params: Mapping[str, Any],
  eval_set: EvalSet,
  batch_size: int = 16,
  *,
  spread: spread_lib.Spread | None = None,
  pause: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Scores a model on a fixed text.

  Log-probabilities are float32 on the device, their sum float64 on the host. With
  several processes each has the whole text, computes its part of every batch, and gets
  the sum over all.

  Args:
    model: a Decoder.
    params: its parameters, of any leaf kinds.
    eval_set: the text; see EvalSet.
    batch_size: rows of a batch.
    spread: the devices that share the work, where the rows divide among them, with
      the model split as in training; None leaves it where the parameters are.
    pause: called before every batch; what it raises ends the evaluation.

  Returns:
    "loss" (nats a predicted token), "perplexity" (its exponential), "bits_per_byte",
    "num_tokens" (predicted ones), "num_bytes", "context" and "stride". The first three
    are None where the model's probabilities are not finite. Without bytes also
    "accuracy": the share of the scored targets that have the highest logit (the first
    of equal ones counts); None where a probability is not finite.
  """
  total, num_tokens, num_right = 0.0, 0, 0
  answers = eval_set.num_bytes is None
  put = jnp.asarray if spread is None else spread.put_all
  split = None if spread is None else _split(spread, model, batch_size)
  for batch in eval_set.batches(batch_size):
    pause()
    arrays = {name: put(value) for name, value in batch.items()}
    nll_BL, right_BL = _scores(model, params, arrays, answers, split)
    scored_BL = np.asarray(batch["weights"]) > 0
    total += float(np.asarray(nll_BL, np.float64)[scored_BL].sum())
    num_tokens += int(scored_BL.sum())
    if answers:
      num_right += int(np.asarray(right_BL)[scored_BL].sum())
  found = summarize(total, num_tokens, eval_set.num_bytes)
  if answers:
    finite = found["loss"] is not None
    found["accuracy"] = num_right / num_tokens if finite else None
  return {**found, "context": eval_set.context, "stride": eval_set.stride}


def summarize(
  total_nats: float, num_tokens: int, num_bytes: int | None
) -> dict[str, Any]:
  """The quality fields of a row, from a summed negative log-likelihood in nats.

  Without bytes there are no bits per byte.
  """
  loss = total_nats / num_tokens
  finite = math.isfinite(loss)
  # Beyond this the exponential leaves float64.
  fits = finite and loss < 700
  per_byte = finite and num_bytes is not None
  return {
    "loss": loss if finite else None,
    "perplexity": math.exp(loss) if fits else None,
    "bits_per_byte": total_nats / math.log(2) / num_bytes if per_byte else None,
    "num_tokens": num_tokens,
    "num_bytes": num_bytes,
  }


class _Split(NamedTuple):
  """What a model is split by: all that a program depends on."""

  mesh: Mesh
  rules: shard_lib.Rules
  schedule: pipeline.Schedule | None


def _split(spread: spread_lib.Spread, model: Any, num_rows: int) -> _Split:
  """As in training, but without a pipeline that rows or layers do not divide into."""
  schedule = spread.schedule()
  if schedule is not None:
    fits = num_rows % (schedule.micro_batches * spread.batch_ways) == 0
    try:
      stack.piped_runs(schedule, model.runs)
    except errors.InputError:
      fits = False
    schedule = schedule if fits else None
  return _Split(spread.mesh, spread.preset.activations, schedule)


@functools.partial(jax.jit, static_argnames=("model", "answers", "split"))
def _scores(
  model: Any,
  params: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
  answers: bool,
  split: _Split | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Of each target its negative log-likelihood, in nats, `[B, L]` float32.

  With `answers` also whether it has the highest logit, `[B, L]` bool. With `split` both
  are whole on every device.
  """
  if split is None:
    return _compare(model, params, batch, answers)
  with (
    shard_lib.use_rules(split.mesh, split.rules),
    pipeline.use_schedule(split.schedule),
  ):
    scores = _compare(model, params, batch, answers)
  whole = NamedSharding(split.mesh, PartitionSpec())
  return jax.lax.with_sharding_constraint(scores, whole)


def _compare(
  model: Any, params: Mapping[str, Any], batch: Mapping[str, jax.Array], answers: bool
) -> tuple[jax.Array, jax.Array | None]:
  logits_BLV, _ = model.apply(
    {"params": params},
    batch["inputs"],
    positions=batch["positions"],
    segments=batch["segments"],
  )
  logits_BLV = logits_BLV.astype(jnp.float32)
  targets_BL1 = batch["targets"][:, :, None]
  chosen_BL = jnp.take_along_axis(logits_BLV, targets_BL1, axis=-1)[:, :, 0]
  # Not log_softmax: that would write all of its `[B, L, V]` to read one in V.
  nll_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - chosen_BL
  if not answers:
    return nll_BL, None
  return nll_BL, jnp.argmax(logits_BLV, axis=-1) == batch["targets"]
