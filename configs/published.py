"""Dense decoders whose training on TPU slices MaxText has published, to plan anew.

Question: is there a faster layout than the published one?

Sizes, slices and rates: effjax.measure.pods.published. The corpus is a stand-in, as
these configs are for plans: nothing of it is read.

Command: effjax plan --config configs/published.py:32b --topology v5e:16x16 --search
Command: effjax plan --config configs/published.py:128b --topology v5p:4x4x8 --search
Without --search the published layout is planned.
"""

import ml_collections

from effjax.core import errors
from effjax.measure.pods import chips, published

_RUNS = {"32b": "32B on v5e-256", "128b": "128B on v5p-256"}


def get_config(arg: str = "32b") -> ml_collections.ConfigDict:
  """The recipe; `arg` is "32b" or "128b"."""
  arg = arg or "32b"
  if arg not in _RUNS:
    raise errors.unknown("argument of configs/published.py:", arg, tuple(_RUNS))
  run = next(run for run in published.RUNS if run.name == _RUNS[arg])
  mesh = run.mesh()
  config = ml_collections.ConfigDict()
  config.data = {
    "corpus": "stdlib",
    "vocab_size": published.VOCAB_SIZE,
    "sequence_length": published.LENGTH,
    "batch_size": run.rows * chips.parse(run.topology).num_chips,
  }
  model = run.model().config
  names = ("vocab_size", "embed_dim", "num_layers", "max_len", "remat")
  config.model = {name: getattr(model, name) for name in names}
  config.model.tie_embeddings = False
  config.model.mixer_options = {
    "attention": {
      "num_heads": run.num_heads,
      "num_kv_heads": run.num_heads,
      "head_dim": published.HEAD_DIM,
    },
  }
  config.model.mlp_options = {"swiglu": {"hidden_dim": run.hidden_dim}}
  config.mesh = {"preset": mesh.preset, "shape": dict(mesh.shape)}
  config.stages = (
    {
      "name": "train",
      "technique": "train",
      "options": {
        "num_steps": run.training().num_steps,
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "precision": {"compute": "bfloat16"},
      },
    },
  )
  return config
