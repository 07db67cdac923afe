"""The usual order of things in one recipe: prune while training, distill, tune, int8.

Question: what does each step of the pipeline cost or bring, and is it better than its
shortcuts?

Sources: gradual magnitude pruning to half (Zhu and Gupta 2017, arXiv:1710.01878);
distillation by logits (Hinton et al. 2015, arXiv:1503.02531) from the model as it was;
a short fine-tuning on the text alone; int8 with one scale an output; an ONNX file. The
order is that of Deep Compression (Han et al. 2016, arXiv:1510.00149, figure 1) with
distillation in place of its second training, as in Prune Once for All (Zafrir et al.
2021, arXiv:2111.05754).

Command: effjax run --config configs/pipeline.py
"""

import ml_collections

from effjax.core import errors

# One scale an output, as the ONNX export takes it over code by code.
_INT8 = {"bits": 8, "group": 0}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe; "smoke" only shows that it works."""
  if arg not in ("", "smoke"):
    raise errors.unknown("argument of configs/pipeline.py:", arg, ("smoke",))
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
    "mixer_options": {
      "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
    },
    "max_len": 256,
  }
  config.measure = {"eval_batch_size": 8, "latency": not smoke, "xz_preset": 0}
  first, long, short = (20, 12, 6) if smoke else (400, 200, 60)
  every = 2 if smoke else 10
  gradual = {
    "name": "gradual_magnitude",
    "sparsity": 0.5,
    "options": {"every": every},
  }
  distilled = {"loss": "logit_kl", "teacher": "dense"}
  config.stages = (
    _train("dense", None, first, 1.0),
    _stage("dense-int8", "rtn", "dense", _INT8),
    # The pipeline.
    _train("gradual", "dense", long, 0.3, sparsity=gradual),
    _train("distilled", "gradual", long, 0.3, **distilled),
    _train("tuned", "distilled", short, 0.1),
    _stage("int8", "rtn", "tuned", _INT8),
    _stage("exported", "export", "int8", {"format": "onnx", "type": "int8"}),
    # What its steps are worth: as long on the text alone, all at once, not at all.
    _train("undistilled", "gradual", long, 0.3),
    _stage("at-once", "magnitude", "dense", {"sparsity": 0.5, "budget": "uniform"}),
    _train("at-once-long", "at-once", 2 * long, 0.3),
    _train("dense-long", "dense", 2 * long, 0.3),
  )
  return config


def _stage(name, technique, after, options):
  return {"name": name, "technique": technique, "after": after, "options": options}


def _train(name, after, num_steps, fraction, **more):
  """Muon; `fraction` scales its learning rate."""
  options = {
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
  }
  return _stage(name, "train", after, options | more)
