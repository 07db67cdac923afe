"""What a pruned or rounded model gets back: adapters beside training it whole.

Question: of what pruning to 70 % and rounding to 3 bits cost, what comes back in 100
steps if only low-rank adapters train, and what becomes of it when they are merged?

Model and text: those of configs/quickstart.py, trained once. All matrices but the
embedding are pruned (sparsegpt), or rounded in groups of 32. Adapters have rank 16 and
AdamW; "whole" trains every parameter with Muon, masks kept. Peak learning rates are
rows. `lora` prunes what it adds alike (keep_zeros), "beside" is the same without that.

Command: effjax run --config configs/recovery.py

Result (one CPU core, 6 minutes for 20 rows; with two the last digits are others); of
three learning rates the best is bold.

| | bits/byte | bits/weight | numbers that train |
| --- | ---: | ---: | ---: |
| train | 1.7122 | 32.00 | 1,120,024 |
| more: as many steps again | 1.6854 | 32.00 | 1,120,024 |
| pruned, 70 % | 1.8408 | 32.76 | |
| whole, 0.001 / 0.003 / 0.01 | 1.7465 / **1.7402** / 1.8187 | 32.76 | 1,120,024 |
| lora, 0.003 / 0.01 / 0.03 | 1.7762 / **1.7550** / 1.7750 | 37.59 | 168,992 |
| lora, merged: as sparse as before | 1.7550 | 32.76 | |
| beside, 0.01 | 1.7517 | 37.59 | 168,992 |
| beside, merged under the mask | 1.7927 | 32.76 | |
| beside, merged into a dense weight | 1.7517 | 32.00 | |
| int3 | 1.7417 | 10.68 | |
| int3, lora 0.01 | 1.7107 | 15.50 | 168,992 |
| int3, merged into floats | 1.7107 | 32.00 | |
| int3, merged and rounded again | 1.7272 | 10.68 | |

Adapters bring back 67 % of what pruning cost, training everything 78 %; they train 15 %
as many numbers. A dense addition wins a little more, and loses nearly half of that when
it is put under the mask, while what was trained under the mask loses nothing: hence the
default. After 3 bits adapters win 0.0310, of which rounding once more takes 0.0165. The
float model was not at its end either (more), so not all of it makes up for rounding.

Command: effjax run --config configs/recovery.py:smoke
Expected: the same stages with one learning rate each, at a size that takes about two
minutes of CPU time; its numbers only show that everything works.
"""

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
    # What as many steps more give to a model that nothing was taken from.
    whole("more", "train", BEST["whole"]),
  )
  return config
