"""Real text at equal parameters: what does each sequence mixer cost in bits per byte?

Question: in one small decoder, with the same parameters, tokens, order of the text and
optimizer, how well does each mixer predict Python's own standard library?

Model: 4 layers of width 128, vocabulary 2,048, sequences of 256; every mixer at the
proportions of its source (see `MIXERS`), a SwiGLU after each. The SwiGLUs are as wide
as it takes to reach 1.1 million parameters in all: within 1 % for every mixer, so what
a mixer spends on itself its MLPs lack. Muon, the same learning rate and number of
steps for all. `hybrid` is three layers of Mamba-2 and one of attention.

Command: effjax run --config configs/mixers/language.py:attention
Command for all: effjax sweep --config configs/mixers/language.py
On two CPU cores give it twice at once, each with NPROC=1: models this small do not keep
two cores busy, and two runs at a time finish about 1.5 times as many steps.
All run with one seed, the best five with two more; 440 steps took 3 to 5 minutes on one
core while another run had the other.

Result, bits per byte of 200,000 bytes (bzip2 takes 1.94; xz, having read the training
text before, 1.50):

| mixer | parameters | seed 0 | mean of three seeds | lowest to highest |
| --- | ---: | ---: | ---: | --- |
| hybrid | 1,097,828 | 1.695 | 1.690 | 1.681 to 1.695 |
| mamba1 | 1,097,856 | 1.706 | 1.700 | 1.696 to 1.706 |
| mamba2 | 1,104,304 | 1.714 | 1.713 | 1.712 to 1.714 |
| longformer | 1,102,976 | 1.776 | 1.775 | 1.772 to 1.776 |
| bigbird | 1,102,976 | 1.802 | 1.805 | 1.802 to 1.809 |
| gated_deltanet | 1,097,056 | 1.810 | | |
| attention | 1,102,976 | 1.812 | | |
| gla | 1,103,360 | 1.832 | | |
| s4d | 1,100,928 | 1.835 | | |
| retnet | 1,094,784 | 1.835 | | |
| mla | 1,099,136 | 1.845 | | |
| deltanet | 1,099,008 | 1.864 | | |
| linear_attention | 1,102,976 | 1.949 | | |
| performer | 1,102,976 | 1.994 | | |

So early in training, what looks at the last few tokens first wins: the Mambas have a
convolution over four tokens, Longformer a window of 64. Full attention has to find
locality by itself. Three layers of Mamba-2 and one of attention beat Mamba-2 alone by
more than the seeds differ, Mamba-1 by about as much.
"""

import jax
import ml_collections

from effjax.core import config as config_lib
from effjax.core import errors
from effjax.models import config as model_config
from effjax.models import decoder

NUM_PARAMS = 1_100_000
HEADS = {"num_heads": 4, "head_dim": 32}
ATTENTION = HEADS | {"num_kv_heads": 4}
MAMBA2 = {"head_dim": 64, "state_dim": 32, "chunk": 32}
# Pattern, and the options of its mixers.
MIXERS = {
  "attention": {"attention": ATTENTION},
  "mla": {"mla": HEADS | {"value_dim": 32, "rope_dim": 16, "kv_rank": 64}},
  "longformer": {"longformer": ATTENTION | {"window": 64}},
  "bigbird": {
    "bigbird": ATTENTION | {"block": 32, "num_global_blocks": 1, "num_random": 1}
  },
  "linear_attention": {"linear_attention": HEADS},
  "performer": {"performer": HEADS | {"num_features": 128}},
  "retnet": {"retnet": HEADS},
  "gla": {"gla": {"num_heads": 4}},
  "deltanet": {"deltanet": {"num_heads": 4}},
  "gated_deltanet": {"gated_deltanet": {"num_heads": 4}},
  "s4d": {"s4d": {}},
  "mamba1": {"mamba1": {}},
  "mamba2": {"mamba2": MAMBA2},
  "hybrid": {"mamba2": MAMBA2, "attention": ATTENTION},
}
# Those that did best with seed 0; two more seeds tell how far apart they are.
BEST = ("hybrid", "mamba1", "mamba2", "longformer", "bigbird")
_EMBED_DIM, _NUM_LAYERS = 128, 4


def get_config(arg: str = "attention") -> ml_collections.ConfigDict:
  """The recipe of one mixer; `arg` is a name in MIXERS."""
  if arg not in MIXERS:
    raise errors.unknown("argument of configs/mixers/language.py:", arg, tuple(MIXERS))
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {
    "corpus": "stdlib",
    "vocab_size": 2048,
    "sequence_length": 256,
    "batch_size": 8,
    "eval_bytes": 200_000,
  }
  config.model = _model(arg)
  config.measure = {"latency": False, "xz_preset": 6}
  config.stages = (
    {
      "name": "train",
      "technique": "train",
      "options": {
        "num_steps": 440,
        "optimizer": {
          "name": "muon",
          "learning_rate": 0.01,
          "schedule": "wsd",
          "schedule_options": {"decay_fraction": 0.4},
        },
        "checkpoint_every": 100,
        "log_every": 20,
      },
    },
  )
  return config


def get_sweep() -> dict:
  """Every mixer with one seed, the best five with two more."""
  runs = [(arg, 0) for arg in MIXERS]
  runs += [(arg, seed) for seed in (1, 2) for arg in BEST]
  args, seeds = zip(*runs, strict=True)
  return {"lists": {"arg": args, "seed": seeds, "data.seed": seeds}}


def _model(arg: str) -> dict:
  """The decoder whose MLPs fill it up to NUM_PARAMS."""
  pattern = tuple(MIXERS[arg])
  model = {
    "vocab_size": 2048,
    "embed_dim": _EMBED_DIM,
    "num_layers": _NUM_LAYERS,
    "pattern": ("mamba2",) * 3 + ("attention",) if arg == "hybrid" else pattern,
    "mixer_options": MIXERS[arg],
    "max_len": 256,
  }
  # A hidden unit has a column in two matrices and a row in a third.
  unit = 3 * _EMBED_DIM * _NUM_LAYERS
  without = _num_params(model | {"mlp_options": {"swiglu": {"hidden_dim": 1}}}) - unit
  hidden_dim = 8 * round((NUM_PARAMS - without) / (8 * unit))
  return model | {"mlp_options": {"swiglu": {"hidden_dim": hidden_dim}}}


def _num_params(model: dict) -> int:
  built = decoder.Decoder(config_lib.build(model_config.DecoderConfig, model, "model"))
  tree = jax.eval_shape(built.init, jax.random.key(0), *built.example_inputs())
  return sum(array.size for array in jax.tree.leaves(tree["params"]))
