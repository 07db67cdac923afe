"""An example run folder: eight rows of plausible numbers and a training curve."""

import json
import math
import pathlib
import random
from typing import Any

_WEIGHTS = 2_180_000
# stage, technique, after, bits/byte, bytes a weight, kept, decode ms, prefill ms, secs
_ROWS = (
  ("train", "train", None, 1.7812, 4.0, 1.0, 2.31, 14.2, 212.0),
  ("int8", "rtn", "train", 1.7819, 1.03, 1.0, 3.02, 14.9, 0.6),
  ("int8-dynamic", "rtn", "train", 1.7856, 1.03, 1.0, 1.62, 9.8, 0.6),
  ("int4", "rtn", "train", 1.8327, 0.63, 1.0, 5.84, 19.6, 0.8),
  ("pruned", "magnitude", "train", 1.9911, 4.12, 0.52, 2.78, 16.0, 0.4),
  ("pruned-tuned", "train", "pruned", 1.8240, 4.12, 0.52, 2.75, 15.8, 31.0),
  ("pruned-int4", "rtn", "pruned-tuned", 1.8831, 0.75, 0.52, 6.11, 20.3, 0.8),
  ("int2", "rtn", "train", 3.4120, 0.34, 0.9, 5.70, 19.1, 0.8),
)
REFERENCES = (
  {"name": "gzip -9", "bits_per_byte": 1.9302},
  {"name": "bzip2 -9", "bits_per_byte": 1.6711},
  {"name": "xz -9e", "bits_per_byte": 1.7204},
  {
    "name": "xz -9e, primed with the training text",
    "bits_per_byte": 1.4377,
  },
)


def rows() -> list[dict[str, Any]]:
  """Rows of result.json."""
  return [_row(*values) for values in _ROWS]


def _row(
  stage: str,
  technique: str,
  after: str | None,
  bits: float,
  bytes_a_weight: float,
  kept: float,
  decode_ms: float,
  prefill_ms: float,
  secs: float,
) -> dict[str, Any]:
  loss = bits * math.log(2) * 200_000 / 69_314
  held = round(_WEIGHTS * bytes_a_weight)
  masked = stage.startswith("pruned")
  return {
    "stage": stage,
    "technique": technique,
    "after": after,
    "quality": {
      "loss": loss,
      "perplexity": math.exp(loss),
      "bits_per_byte": bits,
      "num_tokens": 69_314,
      "num_bytes": 200_000,
      "context": 256,
      "stride": 128,
    },
    "num_params": _WEIGHTS,
    "num_nonzero": round(_WEIGHTS * kept),
    "bits_per_weight": 8 * held / _WEIGHTS,
    "bytes_held": held,
    "bytes_on_disk": held + 4_312,
    "flops_per_token": 4.61e6 * (kept if masked else 1),
    "flops_executed_per_token": 4.61e6,
    "prefill_ms": prefill_ms,
    "decode_ms_p50": decode_ms,
    "decode_ms_p90": decode_ms * 1.14,
    "tokens_per_sec": 970 / decode_ms,
    "peak_memory_bytes": 1_240_000_000 if technique == "train" else 910_000_000,
    "stage_secs": secs,
    "simulated": ["bytes", "flops"] if masked else [],
    "batch": 1,
    "prompt_tokens": 128,
    "decode_tokens": 64,
    "device": "cpu: Intel(R) Xeon(R) Platinum 8488C, 2 cores",
    "seed": 0,
    "corpus": "stdlib sha256:8f1d0c5a77e2",
  }


def metrics() -> list[dict[str, Any]]:
  """Rows of metrics.jsonl: two training stages, one of them evaluated."""
  noise = random.Random(0)
  found = []
  for stage, steps, start, end in (
    ("train", 1800, 7.6, 3.6),
    ("pruned-tuned", 300, 4.4, 3.7),
  ):
    for step in range(10, steps + 1, 10):
      at = step / steps
      loss = end + (start - end) * math.exp(-5 * at) + noise.gauss(0, 0.05)
      row = {"stage": stage, "step": step, "loss": loss, "lr": 4e-3 * (1 - at)}
      found.append(row | {"grad_norm": 0.4 + 0.1 * noise.random(), "tokens": step})
      if step % 300 == 0:
        bits = (end + (start - end) * math.exp(-5 * at)) / 2
        found.append({"stage": stage, "step": step, "eval_bits_per_byte": bits})
  return found


def config() -> dict[str, Any]:
  """What config.json holds, in part."""
  options = {
    "int8": {"bits": 8, "group": 0, "activations": "none"},
    "int8-dynamic": {"bits": 8, "group": 0, "activations": "int8"},
    "int4": {"bits": 4, "group": 32, "activations": "none"},
    "pruned": {"sparsity": 0.5},
  }
  stages = [
    {"name": r[0], "technique": r[1], "after": r[2], "options": options.get(r[0], {})}
    for r in _ROWS
  ]
  return {"seed": 0, "measure": {"warmup_tokens": 8}, "stages": stages}


def write(folder: pathlib.Path) -> None:
  """The files a runner leaves before the report is written."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config()))
  (folder / "env.json").write_text(json.dumps({"jax": "0.10.2", "python": "3.11.7"}))
  lines = "".join(json.dumps(row) + "\n" for row in metrics())
  (folder / "metrics.jsonl").write_text(lines)
