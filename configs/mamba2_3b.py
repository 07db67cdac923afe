"""A Mamba-2 hybrid of three billion parameters, for a slice of 64 v5e chips.

Mamba-2 (Dao and Gu 2024, arXiv:2405.21060) of the width and state of its 2.7B model
(table 9: width 2560, heads of 64, states of 128), every eighth layer attention as its
section 9.2.3 finds best (about a tenth of the layers), and each followed by an MLP of
twice the width; 50,280 tokens of vocabulary, 4096 tokens a sequence, a million a batch.
Everything is sharded over all chips (ZeRO-3), and each layer is recomputed in the
backward pass.

The corpus, Python's own library, needs no download and is far too small for so many
steps: give your own, such as --config.data.corpus=parquet (`effjax list corpora`) with
its files in --config.data.options.paths.

Plan:    effjax plan --config configs/mamba2_3b.py --topology v5e:8x8
Planned: 13.94 of 16.91 GB a chip, 4.75 s a step, MFU 35.6 % (33.4 to 37.4)
Command: effjax run --config configs/mamba2_3b.py    (on every host of such a slice)
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe; `arg` is ""."""
  del arg
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
    "corpus": "stdlib",
    "vocab_size": 50_280,
    "sequence_length": 4096,
    "batch_size": 256,
  }
  config.model = {
    "vocab_size": 50_280,
    "embed_dim": 2560,
    "num_layers": 40,
    "max_len": 4096,
    "pattern": ("mamba2",) * 7 + ("attention",),
    "mixer_options": {
      "mamba2": {"head_dim": 64, "state_dim": 128, "chunk": 256},
      "attention": {"num_heads": 20, "num_kv_heads": 20, "head_dim": 128},
    },
    "mlp_options": {"swiglu": {"hidden_dim": 5120}},
    "remat": "full",
  }
  config.mesh = {"preset": "fsdp"}
  config.stages = (
    {
      "name": "train",
      "technique": "train",
      "options": {
        "num_steps": 200_000,
        "micro_batches": 2,
        "optimizer": {
          "name": "adamw",
          "learning_rate": 6e-4,
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
