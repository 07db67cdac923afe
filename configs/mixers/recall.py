"""Multi-query associative recall: which sequence mixers can look things up?

Question: with more key-value pairs in a sequence than a head is wide, does a mixer
still give the right value for every key?

Task: corpus `mqar` (Arora et al. 2023, Zoology, arXiv:2312.04927): 18 pairs, then 18
queries among random tokens, 128 tokens of a vocabulary of 256. Model, as there: 2
layers of width 64 without MLPs, 4 heads of 16 (recurrent mixers: see `MIXERS`), no
position but what the mixer brings. Muon, batch 32, 1,500 steps, the same three learning
rates for every mixer, each from the same fresh model; the best counts. Solved means
99 % of 18,000 answers right; one fixed value for every key gets 0.9 %. `hybrid` is a
layer of Mamba-2 and one of attention.

What it takes to be learned so soon, found in some 60 runs on a GPU (by a loop of their
own, not this recipe, so these numbers of 20 and 32 pairs are leads): attention needs
biases, with which a head looks one token back whatever the tokens are (without them it
stays for long where it only knows which values a sequence holds, and leaves at few
rates). Recurrent mixers need embeddings that the first layer's output does not drown:
Mamba-2 got 99 % of 20 pairs in 1,500 steps from a standard deviation of 0.5 or 1, 83 %
in 2,000 from 0.2, and 5 % of 32 pairs in 1,300 from the usual 0.02. Attention prefers
0.1 to 0.3; 0.4 serves both.

Command: effjax run --config configs/mixers/recall.py:attention
Command for all: effjax sweep --config configs/mixers/recall.py
On two CPU cores give it twice at once, each with NPROC=1: models this small do not keep
two cores busy, and two runs at a time finish about 1.5 times as many steps.

Result, one seed, 7 minutes a mixer on one of two CPU cores:

| mixer | parameters | 0.005 | 0.01 | 0.02 | solved |
| --- | ---: | ---: | ---: | ---: | --- |
| attention | 49,856 | 100.0 % | 100.0 % | 100.0 % | yes |
| hybrid | 61,304 | 100.0 % | 99.9 % | 100.0 % | yes |
| deltanet | 51,424 | 99.8 % | 92.5 % | 93.8 % | yes |
| bigbird | 49,856 | 6.9 % | 6.8 % | 96.9 % | no, nearly |
| gated_deltanet | 60,144 | 97.4 % | 2.0 % | 0.9 % | no, nearly |
| mamba2 | 72,752 | 92.8 % | 92.2 % | 72.7 % | no, still learning |
| gla | 61,792 | 15.7 % | 18.3 % | 14.3 % | no |
| retnet | 82,112 | 16.6 % | 16.2 % | 16.3 % | no |
| mamba1 | 81,856 | 14.3 % | 15.8 % | 0.9 % | no |
| linear_attention | 49,344 | 10.2 % | 13.7 % | 13.2 % | no |
| mla | 50,432 | 8.3 % | 10.2 % | 11.1 % | no |
| s4d | 41,664 | 6.0 % | 7.3 % | 10.1 % | no |
| performer | 49,344 | 5.4 % | 4.8 % | 8.1 % | no |
| longformer | 74,816 | 5.5 % | 6.2 % | 8.0 % | no |

Whoever knows only which 18 values a sequence holds gets 5.6 %. Attention, and one layer
of it behind one of Mamba-2, solve the task at every rate. Of the memories of 16 x 16 a
head, the delta rule, which overwrites what it held for a key, holds the 18 pairs; the
others add up. Mamba-2 has more heads, and was still gaining when the rate had decayed.
MLA has no biases, and did not find the token before in 1,500 steps; BigBird found it at
one rate: that says something about this recipe, not about what they could hold.
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
  "longformer": {"longformer": ATTENTION | {"window": 32}},
  "bigbird": {
    "bigbird": ATTENTION | {"block": 16, "num_global_blocks": 1, "num_random": 1}
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


def get_sweep() -> dict:
  """Every mixer with one seed."""
  return {"grid": {"arg": tuple(MIXERS)}, "seeds": 1}
