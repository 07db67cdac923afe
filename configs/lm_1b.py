"""A dense decoder of a billion parameters, for a slice of 16 v5e chips.

The sizes of Llama 3.2 1B (Meta 2024): 16 layers of 2048, 32 query heads and 8 key heads
of 64, an MLP of 8192, 128,256 tokens of vocabulary that the output head shares; 4096
tokens a sequence, half a million a batch. Everything is sharded over all chips
(ZeRO-3), and each layer is recomputed in the backward pass.

The corpus, Python's own library, needs no download and is far too small for so many
steps: give your own, such as --config.data.corpus=parquet (`effjax list corpora`) with
its files in --config.data.options.paths.

Plan:    effjax plan --config configs/lm_1b.py --topology v5e:4x4
Planned: 15.67 of 16.91 GB a chip, 2.25 s a step, MFU 61.5 % (57.5 to 64.5)
Command: effjax run --config configs/lm_1b.py    (on every host of such a slice)
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe; `arg` is ""."""
  del arg
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
    "corpus": "stdlib",
    "vocab_size": 128_256,
    "sequence_length": 4096,
    "batch_size": 128,
  }
  config.model = {
    "vocab_size": 128_256,
    "embed_dim": 2048,
    "num_layers": 16,
    "max_len": 4096,
    "mixer_options": {
      "attention": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 64},
    },
    "mlp_options": {"swiglu": {"hidden_dim": 8192}},
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
