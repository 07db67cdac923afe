"""What a pruned or rounded model gets back: adapters beside training it whole."""

import ml_collections

from effjax.core import errors

RANK = 16
# Peak learning rates, the best of three each (see the docstring).
RATES = {"whole": 0.003, "adapters": 0.01}


def _training(num_steps, learning_rate, smoke, optimizer):
  return {
    "num_steps": num_steps,
    "optimizer": {
      "name": optimizer,
      "learning_rate": learning_rate,
      "schedule": "wsd",
      "schedule_options": {"decay_fraction": 0.4},
    },
    "eval_max_bytes": 5_000,
    "checkpoint_every": 100,
    "log_every": 10 if smoke else 20,
  }


def _stage(name, technique, after, **options):
  return {"name": name, "technique": technique, "after": after, "options": options}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe; "smoke" only shows that it works."""
  if arg not in ("", "smoke"):
    raise errors.unknown("argument of configs/recovery.py:", arg, ("smoke",))
  smoke = arg == "smoke"
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
    "corpus": "stdlib",
    "vocab_size": 512 if smoke else 2048,
    "sequence_length": 128 if smoke else 256,
    "batch_size": 8,
    "eval_bytes": 5_000 if smoke else 200_000,
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
  config.measure = {"eval_batch_size": 8, "latency": False, "xz_preset": 0}
  steps = 4 if smoke else 100

  def whole(name, after):
    options = _training(steps, RATES["whole"], smoke, "muon")
    return _stage(name, "train", after, **options)

  def adapters(name, after, **lora):
    options = _training(steps, RATES["adapters"], smoke, "adamw")
    lora = {"rank": RANK, "alpha": float(RANK), **lora}
    return (
      _stage(f"{name}-start", "lora", after, **lora),
      _stage(name, "train", f"{name}-start", **options),
    )

  config.stages = (
    {
      "name": "train",
      "technique": "train",
      "options": _training(20 if smoke else 400, 0.01, smoke, "muon"),
    },
    _stage("pruned", "sparsegpt", "train", sparsity=0.7),
    whole("pruned-whole", "pruned"),
    *adapters("pruned-lora", "pruned"),
    _stage("pruned-lora-merged", "merge_lora", "pruned-lora"),
    *adapters("pruned-beside", "pruned", keep_zeros=False),
    _stage("pruned-beside-cut", "merge_lora", "pruned-beside"),
    _stage("pruned-beside-dense", "merge_lora", "pruned-beside", keep_zeros=False),
    _stage("int3", "rtn", "train", bits=3, group=32),
    *adapters("int3-lora", "int3"),
    _stage("int3-lora-merged", "merge_lora", "int3-lora", dequantize=True),
    _stage("int3-lora-again", "rtn", "int3-lora-merged", bits=3, group=32),
  )
  return config
