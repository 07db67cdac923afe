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

Result (one CPU core, 10 minutes): bits per byte, and megabytes on disk.

| | bits/byte | MB |
| --- | ---: | ---: |
| dense, 400 steps | 1.8170 | 4.00 |
| dense-int8 | 1.8171 | 1.81 |
| gradual: 200 steps to half | 1.7566 | 4.10 |
| distilled: 200 more, from dense | 1.7219 | 4.10 |
| tuned: 60 more, on the text alone | 1.7121 | 4.10 |
| int8 | 1.7121 | 1.91 |
| exported, ONNX | 1.7121 | 2.25 |
| undistilled: the 200 on the text alone | 1.7172 | 4.10 |
| at-once: half at once | 1.8502 | 4.10 |
| at-once-long: then 400 steps | 1.6956 | 4.10 |
| dense-long: dense, 400 more | 1.6739 | 4.00 |

Not one of the steps beats its shortcut here, a negative result: 400 steps in one piece
after pruning at once are better than the 460 of the pipeline, whose learning rate falls
three times, and the teacher, which is no better trained than its student soon is, takes
0.0047 from what the text alone gives. All of it is a model far from its end: what half
of the weights costs (0.0217 between the two long rows) is a seventh of what the steps
bring. Pruning and int8 add up: int8 costs nothing in either. Masks are held beside the
codes, so int8 of the pruned model is larger than that of the dense one until `pack`.
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
