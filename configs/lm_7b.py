"""A dense decoder of 7 billion parameters, for a slice of 256 v5e chips.

Sizes of Llama 2 7B (Touvron et al. 2023, arXiv:2307.09288): 32 layers of 4096, 32
heads, an MLP of 11,008, a vocabulary of 32,000, 4096 tokens a sequence, four million a
batch. Everything is sharded over all chips (ZeRO-3), and each layer is recomputed in
the backward pass.

The corpus, Python's own library, needs no download and is far too small for so many
steps: give your own, such as --config.data.corpus=parquet (`effjax list corpora`) with
its files in --config.data.options.paths.

Plan:    effjax plan --config configs/lm_7b.py --topology v5e:16x16
Planned: 9.17 of 16.91 GB a chip, 5.79 s a step, MFU 62.2 % (58.2 to 65.2)
Command: effjax run --config configs/lm_7b.py    (on every host of such a slice)
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
    "batch_size": 1024,
  }
  config.model = {
    "vocab_size": 32_000,
    "embed_dim": 4096,
    "num_layers": 32,
    "max_len": 4096,
    "mixer_options": {
      "attention": {"num_heads": 32, "num_kv_heads": 32, "head_dim": 128},
    },
    "mlp_options": {"swiglu": {"hidden_dim": 11_008}},
    "tie_embeddings": False,
    "remat": "full",
  }
  config.mesh = {"preset": "fsdp"}
  everything = {"kind": ("matrix", "embedding")}
  config.stages = (
    {
      "name": "train",
      "technique": "train",
      "options": {
        "num_steps": 500_000,
        "optimizer": {
          "name": "adamw",
          "learning_rate": 3e-4,
          "schedule": "warmup_cosine",
          "schedule_options": {"warmup_steps": 2000},
        },
        "precision": {"compute": "bfloat16"},
        "checkpoint_every": 1000,
        "log_every": 10,
        "eval_max_bytes": 1_000_000,
      },
    },
    {"name": "int8", "technique": "rtn", "where": everything, "options": {"bits": 8}},
    {
      "name": "int4",
      "technique": "rtn",
      "after": "train",
      "where": everything,
      "options": {"bits": 4, "group": 32},
    },
  )
  return config
