"""Short ListOps: which sequence mixers can follow brackets?

Question: how far above the majority answer does each mixer get on nested lists of
digits under MIN, MAX, MED and SM?

Task: corpus `listops` (Nangia and Bowman 2018, arXiv:1804.06028), expressions of 16 to
63 symbols (64 tokens with the start), at most 3 operators inside one another; the
digit after the last bracket is scored, nothing else. Model: 2 layers of width 64 with
SwiGLU, 4 heads of 16 (recurrent mixers: see `MIXERS`), no position but what the mixer
brings. Muon at one learning rate, batch 64. `hybrid` is a layer of Mamba-2 and one of
attention. The majority answer is right for 12.1 % of the 2,000 validation expressions.

Command: effjax run --config configs/mixers/listops.py:attention
Command for all: effjax sweep --config configs/mixers/listops.py
On two CPU cores give it twice at once, each with NPROC=1: models this small do not keep
two cores busy, and two runs at a time finish about 1.5 times as many steps.
Result, one seed, in 35 minutes on two busy CPU cores, one run at a time: every mixer is
at least 21 points above the majority answer. One seed tells mixers apart that are
several points apart, not neighbours. "Minutes" are those of training, which other work
on the machine made longer.

| mixer | parameters | accuracy | minutes |
| --- | ---: | ---: | ---: |
| hybrid | 119,544 | 50.5 % | 1.8 |
| gla | 120,288 | 48.5 % | 2.8 |
| retnet | 140,608 | 47.2 % | 1.9 |
| linear_attention | 107,840 | 46.5 % | 1.6 |
| bigbird | 107,840 | 46.1 % | 1.4 |
| deltanet | 109,920 | 46.1 % | 2.6 |
| attention | 107,840 | 45.0 % | 1.3 |
| mamba2 | 131,248 | 44.1 % | 2.5 |
| mamba1 | 140,352 | 42.6 % | 3.3 |
| gated_deltanet | 118,640 | 40.5 % | 3.4 |
| mla | 108,928 | 40.2 % | 1.5 |
| longformer | 132,416 | 38.3 % | 3.0 |
| s4d | 100,160 | 35.2 % | 3.3 |
| performer | 107,840 | 33.7 % | 1.7 |
"""

import ml_collections

from effjax.core import errors

HEADS = {"num_heads": 4, "head_dim": 16}
# Pattern, and the options of its mixers: those of recall.py.
MIXERS = {
  "attention": {"attention": HEADS | {"num_kv_heads": 4}},
  "mla": {"mla": HEADS | {"value_dim": 16, "rope_dim": 8, "kv_rank": 32}},
  "longformer": {"longformer": HEADS | {"window": 16}},
  "bigbird": {"bigbird": HEADS | {"block": 8, "num_global_blocks": 1, "num_random": 1}},
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
    "attention": HEADS | {"num_kv_heads": 4},
  },
}


def get_config(arg: str = "attention") -> ml_collections.ConfigDict:
  """The recipe of one mixer; `arg` is a name in MIXERS."""
  if arg not in MIXERS:
    raise errors.unknown("argument of configs/mixers/listops.py:", arg, tuple(MIXERS))
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
    "corpus": "listops",
    "tokenizer": "ids",
    "vocab_size": 16,
    "options": {"min_length": 16, "max_length": 63, "max_depth": 3},
    "sequence_length": 64,
    "batch_size": 64,
  }
  config.model = {
    "vocab_size": config.data.vocab_size,
    "embed_dim": 64,
    "num_layers": 2,
    "pattern": tuple(MIXERS[arg]),
    "mixer_options": MIXERS[arg],
    "max_len": 64,
  }
  # A row costs little: what is asked here is only whether it learns.
  config.measure = {"latency": False, "eval_batch_size": 50}
  config.stages = (
    {
      "name": "train",
      "technique": "train",
      "options": {
        "num_steps": 600,
        "optimizer": {
          "name": "muon",
          "learning_rate": 0.01,
          "schedule": "wsd",
          "schedule_options": {"decay_fraction": 0.4},
        },
        "checkpoint_every": 0,
        "log_every": 50,
      },
    },
  )
  return config


def get_sweep() -> dict:
  """Every mixer with one seed."""
  return {"grid": {"arg": tuple(MIXERS)}, "seeds": 1}
