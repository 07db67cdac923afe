"""What a data config feeds a model, as plain values and as text to read."""

import json
from typing import Any

import numpy as np

from effjax.data import config as data_config
from effjax.data import pipeline
from effjax.data.builders import base

_SAMPLE_CHARS = 400


def describe(config: data_config.DataConfig, num_samples: int = 3) -> dict[str, Any]:
  """Sizes, hash, tokens and some decoded samples of what a config feeds.

  Returns:
    JSON types: `corpus` (the facts), `batch` (shape, rows an epoch, padding) and
    `samples`; the segments of the first training rows, decoded from the ids that the
    model gets; for images the first labels.

  Raises:
    InputError: as `pipeline.open_data`.
  """
  pipeline.check(config)
  corpus = pipeline.open_corpus(config)
  if corpus.kind == "image":
    return _describe_images(corpus, num_samples)
  data = pipeline.open_data(config)
  rows = data.rows_per_epoch
  batch = next(iter(data.train_iterator()))
  samples = [_segments(data, batch, row) for row in range(config.batch_size)]
  counted = float(batch["weights"].mean())
  return {
    "corpus": data.facts,
    "batch": {
      "rows": config.batch_size,
      "sequence_length": config.sequence_length,
      "tokens": config.batch_size * config.sequence_length,
      "counted_fraction": round(counted, 4),
      "rows_per_epoch": rows,
      "steps_per_epoch": round(rows / config.batch_size, 2),
    },
    "samples": samples[:num_samples],
  }


def render(description: dict[str, Any]) -> str:
  """The result of `describe` as text for a terminal."""
  corpus = description["corpus"]
  lines = [f"corpus {corpus['name']}: {corpus['origin']} ({corpus['licence']})"]
  lines.append(f"  hash            {corpus['hash']}")
  if "python" in corpus:
    lines.append(f"  python          {corpus['python']}")
  dropped = corpus.get("dropped", {})
  if any(dropped.values()):
    reasons = ", ".join(f"{count} {why}" for why, count in dropped.items() if count)
    lines.append(f"  dropped         {reasons}")
  for split, count in corpus["documents"].items():
    parts = [f"{count:,} documents"]
    if "bytes" in corpus:
      parts.append(f"{corpus['bytes'][split]:,} bytes")
    if "tokens" in corpus:
      parts.append(f"{corpus['tokens'][split]:,} tokens")
    if "bytes_per_token" in corpus:
      parts.append(f"{corpus['bytes_per_token'][split]:.2f} bytes/token")
    if "scored" in corpus:
      parts.append(f"{corpus['scored'][split]:,} answers")
      parts.append(f"the most frequent one {corpus['majority'][split]:.1%} of them")
    lines.append(f"  {split:<15} {', '.join(parts)}")
  if "batch" in description:
    lines += _render_batch(corpus, description["batch"])
  for number, sample in enumerate(description["samples"], start=1):
    lines.append(f"sample {number}")
    segments = sample if isinstance(sample, list) else [sample]
    lines += [f"  {json.dumps(s, ensure_ascii=False)}" for s in segments]
  return "\n".join(lines)


def _render_batch(corpus: dict[str, Any], batch: dict[str, Any]) -> list[str]:
  scored = corpus["eval"]
  text = scored["num_bytes"] is not None
  what = f"{scored['num_bytes']:,} bytes, " if text else ""
  what += f"{scored['num_tokens']:,} {'tokens' if text else 'answers'}"
  return [
    f"  tokenizer       {corpus['tokenizer']}, {corpus['vocab_size']:,} ids",
    f"  evaluation      {what} of {scored['num_documents']} documents, "
    f"context {scored['context']}, stride {scored['stride']}",
    f"batch: {batch['rows']} x {batch['sequence_length']} = {batch['tokens']:,} "
    f"tokens, {batch['counted_fraction']:.1%} counted, "
    f"{batch['steps_per_epoch']:,} steps an epoch",
  ]


def _segments(
  data: pipeline.TextData, batch: dict[str, np.ndarray], row: int
) -> list[str]:
  """The documents (or parts) in a row, decoded and shortened."""
  segments_L = batch["segments"][row]
  texts = []
  for segment in range(1, int(segments_L.max()) + 1):
    ids = batch["inputs"][row][segments_L == segment].tolist()
    if data.arrays["train"].scored_T is not None:
      # The last answer is never an input.
      ids.append(int(batch["targets"][row][len(ids) - 1]))
    text = data.tokenizer.decode(ids)
    long = len(text) > _SAMPLE_CHARS
    texts.append(text[:_SAMPLE_CHARS] + "..." if long else text)
  return texts


def _describe_images(corpus: base.Corpus, num_samples: int) -> dict[str, Any]:
  source = corpus.sources["train"]
  records = [source[index] for index in range(min(num_samples, len(source)))]
  return {
    "corpus": {"name": corpus.name, **corpus.facts},
    "samples": [
      f"image {list(r['image'].shape)} {r['image'].dtype}, label {int(r['label'])}"
      for r in records
    ],
  }
