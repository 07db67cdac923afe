"""Multi-query associative recall: which sequence mixers can look things up?

Question: with more key-value pairs in a sequence than a head is wide, does a mixer
still give the right value for every key?

Task: corpus `mqar` (Arora et al. 2023, Zoology, arXiv:2312.04927): 32 pairs, then 32
queries, in 128 tokens of a vocabulary of 256. Model, as there: 2 layers of width 64
without MLPs, 4 heads of 16 (recurrent mixers: see `MIXERS`), no position but what the
mixer brings. Muon, batch 32, the same three learning rates for every mixer, each from
the same fresh model; the best counts. Solved means 99 % of 32,000 answers right; one
fixed value for every key gets 0.9 %. `hybrid` is a layer of Mamba-2 and one of
attention.

Command: effjax run --config configs/mixers/recall.py:attention
Command for all: python experiments/mixers/run.py recall --jobs 2

Not run yet for all mixers, and not tuned: whether attention leaves its plateau (until
then it only knows which values a sequence holds) hangs on batch, rate and order.
Tuning runs of attention on a busy machine, on 3,200 answers, with the options edited
by hand (no argument of this recipe gives them back), Muon unless said:

| rate | batch | steps | right |
| --- | ---: | ---: | ---: |
| 0.02 | 32 | 500 / 700 of 1,500 | 5.0 % / 99.7 % |
| 0.02, other examples | 32 | 900 | 15.3 % |
| 0.05 | 32 | 900 | 14.9 % |
| 0.02 | 16 | 1,000 | 14.0 % |
| 0.003, AdamW | 64 | 600 of 1,000 | 5.0 % |
| 0.02, wavelengths of base 100 | 32 | 800 / 1,100 of 1,500 | 14.9 % / 13.2 % |
| 0.02, training on 4 to 32 pairs | 32 | 400 | 4.0 % |

Mamba-2, likewise, at the rate 0.005, batch 16, 1,000 steps: 3.2 %; Gated DeltaNet at
0.02 and 0.003 (AdamW), batch 32, 400 steps: 0.8 %.
"""

import ml_collections

from effjax.core import errors

HEADS = {"num_heads": 4, "head_dim": 16}
ATTENTION = HEADS | {"num_kv_heads": 4, "bias": True}
# Pattern, and the options of its mixers. The state a layer carries from token to token
# is a matrix of 16 x 16 a head where the source does not say otherwise.
MIXERS = {
  "attention": {"attention": ATTENTION},
  "mla": {"mla": HEADS | {"value_dim": 16, "rope_dim": 8, "kv_rank": 32}},
  "longformer": {"longformer": HEADS | {"window": 32}},
  "bigbird": {
    "bigbird": HEADS | {"block": 16, "num_global_blocks": 1, "num_random": 1}
  },
  "linear_attention": {"linear_attention": HEADS | {"chunk": 32}},
  "performer": {"performer": HEADS | {"num_features": 64, "chunk": 32}},
  "retnet": {"retnet": HEADS | {"value_dim": 32, "chunk": 32}},
  "gla": {"gla": HEADS | {"value_dim": 16, "chunk": 32}},
  "deltanet": {"deltanet": HEADS | {"value_dim": 16, "chunk": 32}},
  "gated_deltanet": {"gated_deltanet": HEADS | {"value_dim": 16, "chunk": 32}},
  "s4d": {"s4d": {"state_dim": 32, "chunk": 32}},
  "mamba1": {"mamba1": {"state_dim": 16}},
  "mamba2": {"mamba2": {"head_dim": 16, "state_dim": 16, "chunk": 32}},
  "hybrid": {
    "mamba2": {"head_dim": 16, "state_dim": 16, "chunk": 32},
    "attention": ATTENTION,
  },
}
LEARNING_RATES = (5e-3, 1e-2, 2e-2)


def get_config(arg: str = "attention") -> ml_collections.ConfigDict:
  """The recipe of one mixer; `arg` is a name in MIXERS."""
  if arg not in MIXERS:
    raise errors.unknown("argument of configs/mixers/recall.py:", arg, tuple(MIXERS))
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
    "corpus": "mqar",
    "tokenizer": "ids",
    "vocab_size": 256,
    "options": {"num_pairs": 18, "length": 128, "vocab_size": 256},
    "sequence_length": 128,
    "batch_size": 32,
  }
  config.model = {
    "vocab_size": config.data.vocab_size,
    "embed_dim": 64,
    "num_layers": 2,
    "pattern": tuple(MIXERS[arg]),
    "mlp": "none",
    "embed_std": 0.4,
    "mixer_options": MIXERS[arg],
    "max_len": 128,
  }
  # A row costs little: what is asked here is only whether it learns.
  config.measure = {"latency": False, "eval_batch_size": 50}
  config.stages = tuple(
    {
      "name": f"lr-{rate:g}",
      "technique": "train",
      "after": "init",
      "options": {
        "num_steps": 1500,
        "optimizer": {
          "name": "muon",
          "learning_rate": rate,
          "schedule": "wsd",
          "schedule_options": {"decay_fraction": 0.2},
        },
        "checkpoint_every": 0,
        "log_every": 50,
      },
    }
    for rate in LEARNING_RATES
  )
  return config
