"""What a pruned or rounded model gets back: adapters beside training it whole."""

import ml_collections

from effjax.core import errors

RANK = 16
# Peak learning rates, all of them rows; adapters of the other models take the best.
RATES = {"lora": (0.003, 0.01, 0.03), "whole": (0.001, 0.003, 0.01)}
BEST = {"lora": 0.01, "whole": 0.003}


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

  rates = {name: (BEST[name],) for name in RATES} if smoke else RATES

  def lora(name, after, **options):
    options = {"rank": RANK, "alpha": float(RANK), **options}
    return _stage(name, "lora", after, **options)

  def whole(name, after, rate):
    return _stage(name, "train", after, **_training(steps, rate, smoke, "muon"))

  def adapters(name, after, rate=BEST["lora"]):
    return _stage(name, "train", after, **_training(steps, rate, smoke, "adamw"))

  config.stages = (
    {
      "name": "train",
      "technique": "train",
      "options": _training(20 if smoke else 400, 0.01, smoke, "muon"),
    },
    _stage("pruned", "sparsegpt", "train", sparsity=0.7),
    lora("lora-start", "pruned"),
    *(adapters(f"lora-{rate}", "lora-start", rate) for rate in rates["lora"]),
    *(whole(f"whole-{rate}", "pruned", rate) for rate in rates["whole"]),
    _stage("lora-merged", "merge_lora", f"lora-{BEST['lora']}"),
    lora("beside-start", "pruned", keep_zeros=False),
    adapters("beside", "beside-start"),
    _stage("beside-cut", "merge_lora", "beside"),
    _stage("beside-dense", "merge_lora", "beside", keep_zeros=False),
    _stage("int3", "rtn", "train", bits=3, group=32),
    lora("int3-start", "int3"),
    adapters("int3-lora", "int3-start"),
    _stage("int3-merged", "merge_lora", "int3-lora", dequantize=True),
    _stage("int3-again", "rtn", "int3-merged", bits=3, group=32),
  )
  return config
