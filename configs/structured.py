"""Structured pruning of one small hybrid: which groups go, by which score.

Question: what does a model lose that really gets smaller, and what brings it back?

Text: that of configs/quickstart.py. A third of the neurons, half of the query or key
heads, a quarter of the heads of the recurrent mixers or a third of the layers goes, by
every score there is, with three draws of 16,384 tokens of calibration (or three seeds).
Then all but the layers together, to a quarter less parameters, FLOPs or measured time
of all layers; and a short training of what is left.

Command: effjax run --config configs/structured.py

Result (102 rows; 17 minutes of one core, spread over an hour of a busy machine): bits
per byte lost from the 1.7162 of the model, in 0.0001; means of three with their
standard deviation. The share of FLOPs that is left stands in the first column.

| left of the FLOPs | random | magnitude | taylor | wanda | fisher |
| --- | ---: | ---: | ---: | ---: | ---: |
| neurons, 0.84 | 742 ± 57 | 152 | 340 ± 32 | 146 ± 6 | 146 ± 7 |
| heads, 0.95 | 374 ± 22 | 376 | 393 ± 59 | 376 ± 0 | 363 ± 12 |
| kv_groups, 0.94 | 367 ± 101 | 322 | 412 ± 82 | 296 ± 0 | 296 ± 0 |
| ssm_heads, 0.95 | 893 ± 238 | 674 | 692 ± 32 | 606 ± 1 | 593 ± 26 |
| layers, 0.73 to 0.76 | 6409 ± 9053 | 804 | 1146 ± 296 | 804 ± 0 | 807 ± 4 |

Of layers "influence" loses 1214, "loss" 804. Neurons, heads and ssm_heads together:

| a quarter less of | random | fisher | FLOPs left | parameters left |
| --- | ---: | ---: | ---: | ---: |
| the groups, everywhere | 1559 ± 284 | 713 ± 26 | 0.82 | 0.82 |
| parameters | 10404 ± 1993 | 114 ± 1 | 0.81 | 0.79 |
| FLOPs | 4489 ± 790 | 166 ± 3 | 0.78 | 0.76 |
| FLOPs, then 60 steps | 1637 ± 215 | -51 ± 37 | 0.78 | 0.76 |
| measured time | 2851 ± 1056 | 312 ± 140 | 0.74 | 0.72 |

(Of all layers; the embedding is not pruned.) With scores that mean the same everywhere
a budget pays far more than a better score: 713 with the same share in every module, 166
where the budget decides, for less. With random ones it empties modules. First-order
scores are close to noise at a minimum, here too; what a group writes into the stream
(wanda) is as good as the curvature (fisher) at a tenth of the cost. Which query head of
a key head goes makes no difference. What time was measured beside other work says
little of this machine.
"""

import ml_collections

from effjax.core import errors

SEEDS = (0, 1, 2)
SCORES = ("random", "magnitude", "wanda", "taylor", "fisher")
# Groups, and the share of them that goes.
GROUPS = {
  "neurons": 0.33,
  "heads": 0.5,
  "kv_groups": 0.5,
  "ssm_heads": 0.25,
  "layers": 0.33,
}
_MIXED = ("neurons", "heads", "ssm_heads")


def _stage(name, options, seed, after="train"):
  return {
    "name": name,
    "technique": "structured",
    "after": after,
    "options": options | ({"seed": seed} if options["score"] == "random" else {}),
    "calibration": {"seed": seed},
  }


def _rows(groups, share, seeds):
  """Every score of one kind of groups."""
  own = ("influence", "loss") if groups == "layers" else ()
  for score in (*SCORES, *own):
    options = {"groups": groups, "sparsity": share, "score": score}
    for seed in seeds[:1] if score == "magnitude" else seeds:
      yield _stage(f"{groups}-{score}-{seed}", options, seed)


def _budgets(seeds, training):
  """Several groups at once, to a quarter less, and trained on."""
  for score in ("random", "fisher"):
    for budget in ("uniform", "params", "flops", "latency"):
      options = {
        "groups": _MIXED,
        "sparsity": 0.25,
        "score": score,
        "budget": budget,
        "tokens": 256,
      }
      for seed in seeds:
        name = f"{budget}-{score}-{seed}"
        yield _stage(name, options, seed)
        if budget == "flops":
          yield training | {"name": f"{name}-tuned", "after": name}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe; "smoke" only shows that it works."""
  if arg not in ("", "smoke"):
    raise errors.unknown("argument of configs/structured.py:", arg, ("smoke",))
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
    "num_layers": 2 if smoke else 6,
    "pattern": ("mamba2", "attention"),
    "mixer_options": {
      "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
      "mamba2": {"head_dim": 32, "state_dim": 32, "chunk": 32},
    },
    "max_len": 256,
  }
  config.measure = {"eval_batch_size": 8, "latency": False, "xz_preset": 0}
  seeds = SEEDS[:1] if smoke else SEEDS
  kinds = {"layers": 0.5} if smoke else GROUPS
  config.stages = (
    _training(20 if smoke else 400) | {"name": "train"},
    *(row for groups, share in kinds.items() for row in _rows(groups, share, seeds)),
    *_budgets(seeds, _training(5 if smoke else 60, 0.1)),
  )
  return config


def _training(num_steps: int, fraction: float = 1.0) -> dict:
  """Muon; `fraction` scales its learning rate."""
  return {
    "technique": "train",
    "options": {
      "num_steps": num_steps,
      "optimizer": {
        "name": "muon",
        "learning_rate": 0.01 * fraction,
        "schedule": "wsd",
        "schedule_options": {"decay_fraction": 0.4},
      },
      "eval_max_bytes": 5_000,
      "checkpoint_every": 100,
      "log_every": 20,
    },
  }
