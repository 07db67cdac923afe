"""Structured pruning of one small hybrid: which groups go, by which score.

Question: what does a model lose that really gets smaller, and what brings it back?

Text: that of configs/quickstart.py. A third of the neurons, half of the query or key
heads, a quarter of the heads of the recurrent mixers or a third of the layers goes, by
every score there is, with three draws of 16,384 tokens of calibration (or three seeds).
Then all but the layers together, to a quarter less parameters, FLOPs or measured time
of all layers; and a short training of what is left.

Command: effjax run --config configs/structured.py
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
