"""A small hybrid trained on real text, then made cheaper in six ways.

Question: what does each way cost, in bits per byte, bytes and milliseconds?

Sources: Mamba-2 (Dao and Gu 2024, arXiv:2405.21060), grouped-query attention (Ainslie
et al. 2023, arXiv:2305.13245), Muon (Jordan et al. 2024), round-to-nearest
quantization, magnitude pruning (Han et al. 2015, arXiv:1506.02626). Text: the source of
Python's own standard library, so nothing is downloaded.

Command: effjax run --config configs/quickstart.py
Expected on two CPU cores: under 6 minutes; the trained row near 1.71 bits per
byte, where gzip -9 takes 2.20.

Command: effjax run --config configs/quickstart.py:smoke
Expected: the same recipe at a size that ends in one to two minutes; its numbers only
show that everything works.
"""

import ml_collections

from effjax.core import errors

_SIZES = ("", "smoke")
# The tied embedding is a quarter of this small model: quantize it too.
_ALL = {"kind": ("matrix", "embedding")}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe; `arg` is "" or "smoke"."""
  if arg not in _SIZES:
    raise errors.unknown("argument of configs/quickstart.py:", arg, _SIZES[1:])
  smoke = arg == "smoke"
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
    "corpus": "stdlib",
    "vocab_size": 512 if smoke else 2048,
    "sequence_length": 128 if smoke else 256,
    "batch_size": 8,
    "eval_bytes": 20_000 if smoke else 200_000,
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
  config.measure = {"eval_batch_size": 8, "xz_preset": 0 if smoke else 6}
  config.stages = (
    {
      "name": "train",
      "technique": "train",
      "options": _training(60 if smoke else 400, smoke),
    },
    {"name": "int8", "technique": "rtn", "where": _ALL, "options": {"bits": 8}},
    {
      "name": "int8-dynamic",
      "technique": "rtn",
      "after": "train",
      "where": _ALL,
      "options": {"bits": 8, "activations": "int8"},
    },
    {
      "name": "int4",
      "technique": "rtn",
      "after": "train",
      "where": _ALL,
      "options": {"bits": 4, "group": 32},
    },
    {
      "name": "pruned",
      "technique": "magnitude",
      "after": "train",
      "options": {"sparsity": 0.5},
    },
    {
      "name": "pruned-tuned",
      "technique": "train",
      "options": _training(20 if smoke else 40, smoke, fraction=0.1),
    },
    {
      "name": "pruned-int4",
      "technique": "rtn",
      "where": _ALL,
      "options": {"bits": 4, "group": 32},
    },
  )
  return config


def _training(num_steps: int, smoke: bool, fraction: float = 1.0) -> dict:
  """Muon; `fraction` scales its learning rate."""
  return {
    "num_steps": num_steps,
    "optimizer": {
      "name": "muon",
      "learning_rate": 0.01 * fraction,
      "schedule": "wsd",
      "schedule_options": {"decay_fraction": 0.4},
    },
    # The stage's row scores all of it; the log only needs to see where it goes.
    "eval_max_bytes": 20_000,
    "checkpoint_every": 25 if smoke else 100,
    "log_every": 10 if smoke else 20,
  }
