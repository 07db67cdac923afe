"""Number formats and roundings on one small model, at 8, 4, 3 and 2 bits.

Question: at equal bits, which format and which rounding keep the most, with no training
after them?

Model and text: those of configs/quickstart.py, trained once. The tied embedding, a
quarter of the parameters, is in int8 everywhere; each row then rounds all other
matrices, after the same model.

Command: effjax run --config configs/formats.py

Result (2 CPU cores, 7 minutes; one seed; `embedding` is what the rows start from, the
embedding in int8 and all else in float32):

| row | bits/byte | lost | bits/weight |
| --- | ---: | ---: | ---: |
| embedding | 1.7122 | – | 26.44 |
| int8 | 1.7124 | +0.0002 | 8.32 |
| fp8 | 1.7124 | +0.0002 | 8.32 |
| mxfp8 | 1.7120 | -0.0003 | 8.35 |
| int4 | 1.7180 | +0.0058 | 5.88 |
| int4-half | 1.7178 | +0.0055 | 5.88 |
| int4-mse | 1.7170 | +0.0048 | 5.88 |
| int4-stochastic | 1.7212 | +0.0090 | 5.88 |
| int4-gptq | 1.7147 | +0.0025 | 5.88 |
| int4-asymmetric | 1.7158 | +0.0036 | 6.07 |
| nf4 | 1.7175 | +0.0053 | 5.88 |
| nf4-double | 1.7173 | +0.0051 | 5.33 |
| nf4-gptq | 1.7148 | +0.0025 | 5.88 |
| fp4 | 1.7193 | +0.0071 | 5.88 |
| mxfp4 | 1.7200 | +0.0078 | 5.31 |
| mxfp4-even | 1.7198 | +0.0076 | 5.31 |
| mxfp4-gptq | 1.7168 | +0.0046 | 5.31 |
| nvfp4 | 1.7175 | +0.0052 | 5.50 |
| nvfp4-gptq | 1.7157 | +0.0035 | 5.50 |
| int3 | 1.7415 | +0.0293 | 5.12 |
| int3-gptq | 1.7295 | +0.0173 | 5.12 |
| int2 | 1.8196 | +0.1074 | 4.55 |
| int2-gptq | 1.7836 | +0.0714 | 4.55 |
| ternary | 2.0521 | +0.3399 | 4.36 |

GPTQ takes away a third to more than a half of what nearest loses, in every format and
at every width. Among 4-bit formats an asymmetric grid loses least, nf4, nvfp4 and
symmetric integers follow close together, and mxfp4, whose powers of two take a quarter
of the bits of a float32 scale, loses most. At 8 bits all are the same. Bits a weight
are more than those of the codes: with groups of 32 a float32 scale is a whole bit, and
what is neither a matrix nor the embedding stays in float32. One seed, so that
differences below 0.001 say nothing.
"""

import ml_collections

from effjax.core import errors

SIZES = ("", "smoke")
# Name, rounding, options.
ROWS = (
  ("int8", "rtn", {"bits": 8}),
  ("fp8", "rtn", {"format": "fp8"}),
  ("mxfp8", "rtn", {"format": "mxfp8"}),
  ("int4", "rtn", {"bits": 4, "group": 32}),
  ("int4-half", "rtn", {"bits": 4, "group": 32, "grid": "half"}),
  ("int4-mse", "rtn", {"bits": 4, "group": 32, "range": "mse"}),
  ("int4-stochastic", "stochastic", {"bits": 4, "group": 32}),
  ("int4-gptq", "gptq", {"bits": 4, "group": 32}),
  ("int4-asymmetric", "rtn", {"bits": 4, "group": 32, "symmetric": False}),
  ("nf4", "rtn", {"format": "nf4", "group": 32}),
  ("nf4-double", "rtn", {"format": "nf4", "group": 32, "double_group": 32}),
  ("nf4-gptq", "gptq", {"format": "nf4", "group": 32}),
  ("fp4", "rtn", {"format": "fp4", "group": 32}),
  ("mxfp4", "rtn", {"format": "mxfp4"}),
  ("mxfp4-even", "rtn", {"format": "mxfp4", "scale_rule": "even"}),
  ("mxfp4-gptq", "gptq", {"format": "mxfp4"}),
  ("nvfp4", "rtn", {"format": "nvfp4"}),
  ("nvfp4-gptq", "gptq", {"format": "nvfp4"}),
  ("int3", "rtn", {"bits": 3, "group": 32}),
  ("int3-gptq", "gptq", {"bits": 3, "group": 32}),
  ("int2", "rtn", {"bits": 2, "group": 32, "symmetric": False}),
  ("int2-gptq", "gptq", {"bits": 2, "group": 32, "symmetric": False}),
  ("ternary", "rtn", {"format": "ternary", "group": 32, "per_tensor": False}),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe; "smoke" is small enough to see that it works."""
  if arg not in SIZES:
    raise errors.unknown("argument of configs/formats.py:", arg, SIZES[1:])
  smoke = arg == "smoke"
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
    "corpus": "stdlib",
    "vocab_size": 512 if smoke else 2048,
    "sequence_length": 128 if smoke else 256,
    "batch_size": 8,
    "eval_bytes": 5_000 if smoke else 200_000,
  }
  config.model = {
    "vocab_size": config.data.vocab_size,
    "embed_dim": 64 if smoke else 128,
    "num_layers": 2 if smoke else 4,
    "pattern": ("mamba2", "attention"),
    "mixer_options": {
      "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
      "mamba2": {"head_dim": 64, "state_dim": 32, "chunk": 32},
    },
    "max_len": 256,
  }
  config.measure = {"eval_batch_size": 8, "latency": False, "xz_preset": 0}
  training = {
    "num_steps": 20 if smoke else 400,
    "optimizer": {
      "name": "muon",
      "learning_rate": 0.01,
      "schedule": "wsd",
      "schedule_options": {"decay_fraction": 0.4},
    },
    "eval_max_bytes": 5_000,
    "checkpoint_every": 100,
    "log_every": 20,
  }
  rows = tuple(
    {
      "name": name,
      "technique": technique,
      "after": "embedding",
      "options": options,
    }
    for name, technique, options in ROWS
  )
  config.stages = (
    {"name": "train", "technique": "train", "options": training},
    {"name": "embedding", "technique": "rtn", "where": {"kind": "embedding"}},
    *rows,
  )
  return config
