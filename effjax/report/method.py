"""How each number was measured, in words, with the settings of the runs at hand."""

from collections.abc import Mapping, Sequence
from typing import Any

from effjax.report import result as result_lib


def definitions(results: Sequence[result_lib.Result]) -> list[tuple[str, str]]:
  """(term, explanation) pairs; differing settings of several runs are all named."""
  rows = [row for result in results for row in result.stages]

  def settings(*names: str) -> list[str]:
    return [_values([row[name] for row in rows]) for name in names]

  def scoring(name: str) -> str:
    return _values([row["quality"].get(name) for row in rows])

  batch, prompt, decoded = settings("batch", "prompt_tokens", "decode_tokens")
  (device,) = settings("device")
  warmup = _values(
    [(result.config.get("measure") or {}).get("warmup_tokens") for result in results]
  )
  asked = [row["quality"] for row in rows if row["quality"].get("task")]
  answers = _of_tasks(asked) or [
    (
      "accuracy",
      f"share of the {scoring('num_tokens')} scored targets whose most likely "
      "prediction is right; only answers are scored.",
    )
  ]
  spread = [
    (
      "a ± b",
      "mean and sample standard deviation (n - 1) over the runs of a group; without ±, "
      "all runs agree. Curves, environment and config are those of its first run.",
    )
  ]
  first = spread if any(result.runs for result in results) else []
  has_answers = any(row["quality"].get("accuracy") is not None for row in rows)
  first += answers if has_answers else []
  text = [
    (
      "bits per byte",
      "summed negative log-likelihood of every predicted token, in nats, over ln 2 and "
      f"over the {scoring('num_bytes')} UTF-8 bytes of the raw validation text. The "
      f"model sees at most {scoring('context')} tokens; windows move on by "
      f"{scoring('stride')} tokens, and each token is scored once.",
    ),
    (
      "perplexity",
      "exponential of the mean negative log-likelihood of the "
      f"{scoring('num_tokens')} predicted tokens. It depends on the vocabulary.",
    ),
  ]
  if not any("num_bytes" in row["quality"] for row in rows):
    text = []
  return [
    *first,
    *text,
    (
      "Δ bits/byte, x slower, x smaller" if text else "points, x slower, x smaller",
      "compared with the stage the row started from. Timings within 5 % count as "
      "the same.",
    ),
    (
      "bits per weight",
      "8 x bytes held by all parameters / logical parameters of the model before "
      "compression. Scales, zero points and masks count.",
    ),
    (
      "MB held, MB disk",
      "bytes of all parameter arrays as they are in memory; bytes of the safetensors "
      "file of the same arrays, uncompressed. 1 MB is 10^6 bytes.",
    ),
    (
      "FLOPs per token",
      "2 for each multiply-add of matrix products and convolutions in a forward pass "
      f"over {prompt} tokens, per token; elementwise work is not counted. Executed: "
      "what runs, whatever the width of the operands; masked weights are multiplied "
      "whole. Theoretical: without the multiplications by pruned weights. Causal "
      "attention counts as it is computed, in both.",
    ),
    (
      "prefill and decode",
      f"batch {batch}, a prompt of {prompt} random tokens (median of repeats), then "
      f"{decoded} tokens decoded one by one after {warmup} of warm-up, each step "
      "waited for; percentiles over those steps. Sampling is not included. "
      f"Device: {device}.",
    ),
    (
      "peak memory",
      "largest resident size of the process during the stage (VmHWM after a reset), or "
      "the accelerator allocator's peak; empty where neither can be read.",
    ),
    ("stage s", "wall time of the stage, without measuring it."),
    (
      "simulated",
      '"bytes" or "flops": what the technique promises but this form does not save. A '
      "mask over dense weights saves nothing here: the product runs whole.",
    ),
    (
      "compressors",
      "gzip, bzip2 and xz see exactly the validation text and nothing else. Primed xz "
      "has read the training text before, as the models have: what the validation text "
      "adds to the compressed training text.",
    ),
  ]


def _of_tasks(asked: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
  """What the accuracy is, for each way that questions were answered."""
  ways = {
    "log-likelihood": "the model's answer is the one of the highest log-likelihood, "
    "with no example shown before",
    "linear probe": "logistic regression on the model's embeddings answers, fitted on "
    "the other four fifths of the texts that were taken",
  }
  found = []
  for way in dict.fromkeys(quality["answered_by"] for quality in asked):
    mine = [quality for quality in asked if quality["answered_by"] == way]
    values = {
      name: _values([quality[name] for quality in mine])
      for name in ("task", "num_examples")
    }
    known = [quality["stderr"] for quality in mine if quality["stderr"] is not None]
    certain = ""
    if known:
      certain = f"Its standard error is up to {100 * max(known):.1f} points. "
    majority = _values([f"{100 * quality['majority']:.1f} %" for quality in mine])
    found.append(
      (
        "accuracy",
        f"share of {values['num_examples']} examples of {values['task']} answered "
        f"right: {ways[way]}. {certain}Always giving the most frequent answer would "
        f"get {majority}.",
      )
    )
  return found


def corpora(results: Sequence[result_lib.Result]) -> list[str]:
  """Name and hash of each corpus, once."""
  return list(dict.fromkeys(row["corpus"] for r in results for row in r.stages))


def _values(values: Sequence) -> str:
  """The one value, or all of them: "128", "128 or 256"."""
  known = list(dict.fromkeys(v for v in values if v is not None))
  shown = [f"{v:,}" if isinstance(v, int) else str(v) for v in known]
  return " or ".join(shown) or "an unknown number of"
