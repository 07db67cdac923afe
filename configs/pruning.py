"""Scores for pruning on one small model, at 30, 50 and 70 % and 2:4.

Question: which weights can go after training, with nothing trained after them?

Model and text: those of configs/quickstart.py, trained once. All matrices but the
embedding lose the same share, so that rows differ by the score alone; `owl` rows and
those of one threshold for the whole model say what another budget does. Calibration has
16,384 tokens that evaluation does not have; calibrated rows are run with three draws of
them, random ones with three seeds.

Command: effjax run --config configs/pruning.py

Result (one CPU core, 17 minutes for 110 rows): bits/byte lost from the 1.7122 of the
model, in 0.0001; means of three draws with their standard deviation.

| | 30 % | 50 % | 70 % | 2:4 |
| --- | ---: | ---: | ---: | ---: |
| random | 4281 ± 115 | 8896 ± 127 | 13747 ± 877 | 8869 ± 241 |
| taylor | 454 ± 22 | 1529 ± 27 | 4717 ± 74 | 2899 ± 73 |
| magnitude | 62 | 376 | 1851 | 1067 |
| magnitude, one threshold | 76 | 402 | 1907 | |
| wanda | 70 ± 3 | 412 ± 2 | 2112 ± 28 | 985 ± 5 |
| wanda, owl | 111 ± 2 | 590 ± 4 | 3131 ± 31 | |
| fisher | 45 ± 1 | 269 ± 10 | 1389 ± 20 | 1012 ± 35 |
| obd | 43 ± 3 | 270 ± 3 | 1321 ± 20 | 960 ± 6 |
| sparsegpt | 37 ± 2 | 238 ± 4 | 1287 ± 1 | 633 ± 10 |
| sparsegpt, in turn | 37 ± 2 | 239 ± 3 | 1302 ± 4 | 635 ± 8 |
| obs | 35 ± 3 | 190 ± 5 | 955 ± 12 | |

Moving what stays pays most: OBS, which picks one weight after the other, loses half of
what magnitude does, SparseGPT, which goes in a fixed order, two thirds. Of scores that
change nothing those of second order are ahead; that of first order is close to noise
at a minimum. Wanda does not beat magnitude here, and OWL makes it worse: this model has
no channels that stand out, which both are about (SmolLM2 has them:
experiments/pruning).

Order: half of the weights pruned and the rest in int4, groups of 32, one after the
other or at once. `effjax run --config configs/pruning.py:order` (33 rows, 19 minutes on
two busy cores); lost as above, with three draws of calibration text:

| | int4 alone | wanda, then int4 | int4, then wanda | sparsegpt, then int4 | at once |
| --- | ---: | ---: | ---: | ---: | ---: |
| rtn | 58 | 453 ± 3 | 483 | 268 ± 5 | |
| gptq | 25 ± 2 | 440 ± 2 | 463 ± 5 | 265 ± 2 | |
| sparsegpt with quantize | | | | | 263 ± 5 |

Alone, wanda loses 411 ± 3 and sparsegpt 239 ± 3. Pruning first is better than last, by
24 to 30. The one sweep for both is not better than GPTQ after SparseGPT by more than
the draws differ (-3, -7 and +2); it saves a calibration. Packed, the file is 34 % of
the float32 one, 1.51 of 4.48 MB, of which 1.05 are the embedding, left as it was; under
a mask it is larger (1.72 MB) than int4 alone (1.61 MB).
"""

import ml_collections

from effjax.core import errors

ARGUMENTS = ("order", "smoke")
SEEDS = (0, 1, 2)
AMOUNTS = {
  "30": {"sparsity": 0.3},
  "50": {"sparsity": 0.5},
  "70": {"sparsity": 0.7},
  "2of4": {"pattern": "2:4"},
}
# Name, transform, options beside the amount, order of calibration.
_CALIBRATED = (
  ("taylor", "taylor", {}, "one_shot"),
  ("fisher", "fisher", {}, "one_shot"),
  ("obd", "obd", {}, "one_shot"),
  ("wanda", "wanda", {}, "one_shot"),
  ("wanda-owl", "wanda", {"budget": "owl"}, "one_shot"),
  ("sparsegpt", "sparsegpt", {}, "one_shot"),
  ("sparsegpt-turns", "sparsegpt", {}, "sequential"),
  ("obs", "obs", {}, "one_shot"),
)
# What "2:4" leaves no choice of: a budget, or single weights.
_NOT_OF_GROUPS = ("wanda-owl", "obs")


def _stage(name, technique, options, **more):
  return {
    "name": name,
    "technique": technique,
    "after": "train",
    "options": options,
    **more,
  }


def _rows(amount, options, seeds):
  """Every score at one amount."""
  grouped = "pattern" in options
  yield _stage(f"{amount}-magnitude", "magnitude", options | {"budget": "uniform"})
  if not grouped:
    yield _stage(f"{amount}-magnitude-global", "magnitude", options)
  for seed in seeds:
    yield _stage(f"{amount}-random-{seed}", "random", options | {"seed": seed})
  for name, technique, more, order in _CALIBRATED:
    if grouped and name in _NOT_OF_GROUPS:
      continue
    for seed in seeds:
      calibration = {"seed": seed}
      if order != "one_shot":
        calibration["order"] = order
      yield _stage(
        f"{amount}-{name}-{seed}", technique, options | more, calibration=calibration
      )


def _all_rows(amounts, smoke):
  for amount, options in amounts.items():
    yield from _rows(amount, options, SEEDS[:1] if smoke else SEEDS)


def _orders(seeds):
  """Half of the weights gone and the rest in int4: before, after, and at once."""
  half, int4 = AMOUNTS["50"], {"bits": 4, "group": 32}
  even = half | {"budget": "uniform"}
  yield _stage("rtn", "rtn", int4)
  yield _stage("rtn-wanda", "wanda", even) | {"after": "rtn"}
  for seed in seeds:
    more = {"calibration": {"seed": seed}}
    for pruner in ("wanda", "sparsegpt"):
      pruned = f"{pruner}-{seed}"
      yield _stage(pruned, pruner, even, **more)
      yield _stage(f"{pruner}-rtn-{seed}", "rtn", int4) | {"after": pruned}
      yield _stage(f"{pruner}-gptq-{seed}", "gptq", int4, **more) | {"after": pruned}
    yield _stage(f"gptq-{seed}", "gptq", int4, **more)
    yield _stage(f"gptq-wanda-{seed}", "wanda", even, **more) | {
      "after": f"gptq-{seed}"
    }
    joint = even | {"quantize": int4}
    yield _stage(f"joint-{seed}", "sparsegpt", joint, **more)
    yield _stage(f"joint-pack-{seed}", "pack", {}) | {"after": f"joint-{seed}"}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe; "order" prunes and quantizes, "smoke" only shows that it works."""
  if arg not in ("", *ARGUMENTS):
    raise errors.unknown("argument of configs/pruning.py:", arg, ARGUMENTS)
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
  amounts = {"50": AMOUNTS["50"], "2of4": AMOUNTS["2of4"]} if smoke else AMOUNTS
  config.stages = (
    {
      "name": "train",
      "technique": "train",
      "options": {
        "num_steps": 20 if smoke else 400,
        "optimizer": {
          "name": "muon",
          "learning_rate": 0.01,
          "schedule": "wsd",
          "schedule_options": {"decay_fraction": 0.4},
        },
        "eval_max_bytes": 5_000,
        "checkpoint_every": 100,
        "log_every": 20,
      },
    },
    *(_orders(SEEDS) if arg == "order" else _all_rows(amounts, smoke)),
  )
  return config
