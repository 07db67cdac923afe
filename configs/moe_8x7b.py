"""A mixture of eight experts of 7 billion parameters, for a slice of 64 v5p chips.

The sizes of Mixtral 8x7B (Jiang et al. 2024, arXiv:2401.04088, table 1): 32 layers of
4096, 32 query heads and 8 key heads of 128, eight experts of 14,336 hidden units of
which a token uses two, a vocabulary of 32,000; 4096 tokens a sequence, a million a
batch. Experts lie on eight groups of chips, everything is sharded over the chips of a
group, and each layer is recomputed in the backward pass. An expert takes at most 1.25
times its even share (the paper's drops nothing).

The corpus, Python's own library, needs no download and is far too small for so many
steps: give your own, such as --config.data.corpus=parquet (`effjax list corpora`) with
its files in --config.data.options.paths.

Plan:    effjax plan --config configs/moe_8x7b.py --topology v5p:4x4x4
Planned: 26.49 of 102.80 GB a chip, 5.71 s a step, MFU 50.1 % (46.9 to 52.5)
Command: effjax run --config configs/moe_8x7b.py    (on every host of such a slice)
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe; `arg` is ""."""
  del arg
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
    "corpus": "stdlib",
    "vocab_size": 32_000,
    "sequence_length": 4096,
    "batch_size": 256,
  }
  config.model = {
    "vocab_size": 32_000,
    "embed_dim": 4096,
    "num_layers": 32,
    "max_len": 4096,
    "mixer_options": {
      "attention": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    },
    "mlp": "moe",
    "mlp_options": {
      "moe": {
        "num_experts": 8,
        "top_k": 2,
        "hidden_dim": 14_336,
        "dispatch": "capacity",
        "balancing_loss": 0.02,
      },
    },
    "tie_embeddings": False,
    "remat": "full",
  }
  config.mesh = {"preset": "fsdp+ep", "shape": {"expert": 8}}
  config.stages = (
    {
      "name": "train",
      "technique": "train",
      "options": {
        "num_steps": 200_000,
        "optimizer": {
          "name": "adamw",
          "learning_rate": 3e-4,
          "schedule": "warmup_cosine",
          "schedule_options": {"warmup_steps": 2000, "final_fraction": 0.1},
        },
        "precision": {"compute": "bfloat16"},
        "checkpoint_every": 1000,
        "eval_max_bytes": 1_000_000,
      },
    },
  )
  return config
