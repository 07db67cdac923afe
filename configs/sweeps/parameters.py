"""Dense, experts, low rank or shared layers: what is a parameter best spent on?

Question: at as many parameters used by a token (active), and at as many stored (total),
which of four decoders predicts Python's own standard library best, and what does it
cost in FLOPs and bytes?

Model: 4 layers of width 128 with attention, vocabulary 2,048, sequences of 256; all but
the MLPs and the sharing is equal. Muon, the same learning rate, tokens and order of
the text for all; three seeds each.

| name | MLPs | active | total |
| --- | --- | ---: | ---: |
| dense | SwiGLU of 384 | 1.12 M | 1.12 M |
| moe-active | 8 experts of 192, 2 a token | 1.12 M | 2.89 M |
| moe-total | 8 experts of 48, 2 a token | 0.68 M | 1.12 M |
| low-rank | SwiGLU of 640, every matrix of rank 64 | 1.12 M | 1.12 M |
| shared-active | dense, every two layers the same parameters | 1.12 M | 0.69 M |
| shared-total | SwiGLU of 936, likewise | 1.96 M | 1.11 M |

(A parameter that two layers share is used twice: it counts twice as active.)

Command: effjax sweep --config configs/sweeps/parameters.py
One of them alone: effjax run --config configs/sweeps/parameters.py:moe-active

Result (CPU, two workers with one core each, about 20 minutes; mean and standard
deviation over the seeds):

| name | bits/byte | params active, total | MFLOPs/token | MB held |
| --- | ---: | ---: | ---: | ---: |
| moe-active | 1.891 +- 0.020 | 1.12 M, 2.89 M | 2.40 | 11.56 |
| moe-total | 1.922 +- 0.007 | 0.68 M, 1.12 M | 1.52 | 4.48 |
| dense | 1.936 +- 0.018 | 1.12 M, 1.12 M | 2.39 | 4.46 |
| shared-total | 1.964 +- 0.014 | 1.96 M, 1.11 M | 4.09 | 4.45 |
| shared-active | 1.968 +- 0.019 | 1.12 M, 0.69 M | 2.39 | 2.76 |
| low-rank | 2.028 +- 0.010 | 1.12 M, 1.12 M | 2.39 | 4.46 |

Per FLOP experts win twice: at 2.4 MFLOPs they are 0.045 better than the dense MLP, more
than two standard deviations, and with 37 % fewer FLOPs still no worse than it. They pay
in bytes: the better of the two holds 2.6 times as many.
Per byte, at 4.5 MB, small experts and the dense MLP are within their spread of each
other; spending the bytes on wide layers that are used twice is worse and costs 1.7
times the FLOPs. What sharing buys is bytes: as predicted, the same layers used twice
hold 2.755 instead of 4.461 MB, for 0.032 bits per byte.
Low rank loses on both counts: at the same bytes and FLOPs it is 0.09 worse than dense,
at a length of training where every model is still far from done.
"""

import ml_collections

from effjax.core import errors

EMBED_DIM, NUM_LAYERS = 128, 4
RANK = 64
MODELS = {
  "dense": {"mlp_options": {"swiglu": {"hidden_dim": 384}}},
  "moe-active": {"mlp": "moe", "mlp_options": {"moe": {"hidden_dim": 192}}},
  "moe-total": {"mlp": "moe", "mlp_options": {"moe": {"hidden_dim": 48}}},
  "low-rank": {"mlp_options": {"swiglu": {"hidden_dim": 640}}},
  "shared-active": {"mlp_options": {"swiglu": {"hidden_dim": 384}}, "share": 2},
  "shared-total": {"mlp_options": {"swiglu": {"hidden_dim": 936}}, "share": 2},
}


def get_config(arg: str = "dense") -> ml_collections.ConfigDict:
  """The recipe of one decoder; `arg` is a name in MODELS."""
  if arg not in MODELS:
    raise errors.unknown("argument of configs/sweeps/parameters.py:", arg, MODELS)
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
    "corpus": "stdlib",
    "vocab_size": 2048,
    "sequence_length": 256,
    "batch_size": 8,
    "eval_bytes": 200_000,
  }
  config.model = {
    "vocab_size": config.data.vocab_size,
    "embed_dim": EMBED_DIM,
    "num_layers": NUM_LAYERS,
    "mixer_options": {"attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 32}},
    "max_len": 256,
    **MODELS[arg],
  }
  config.measure = {"latency": False, "xz_preset": 6}
  train = {
    "name": "train",
    "technique": "train",
    "options": {
      "num_steps": 300,
      "optimizer": {
        "name": "muon",
        "learning_rate": 0.01,
        "schedule": "wsd",
        "schedule_options": {"decay_fraction": 0.4},
      },
      "checkpoint_every": 100,
      "log_every": 20,
    },
  }
  factors = {
    "name": "factors",
    "technique": "svd",
    "after": "init",
    "where": {"path": "/mlp/"},
    "options": {"rank": RANK},
  }
  config.stages = (factors, train) if arg == "low-rank" else (train,)
  return config


def get_sweep() -> dict:
  """Every decoder with three seeds."""
  return {"grid": {"arg": tuple(MODELS)}, "seeds": 3}
