"""Number formats and roundings on one small model, at 8, 4, 3 and 2 bits.

Question: at equal bits, which format and which rounding keep the most, with no training
after them?

Model and text: those of configs/quickstart.py, trained once. The tied embedding, a
quarter of the parameters, is in int8 everywhere; each row then rounds all other
matrices, after the same model.

Command: effjax run --config configs/quantization.py

Result (one CPU core, 5 minutes; one seed; lost from the 1.7122 of the model, of which
`embedding`, what the rows start from, has the embedding in int8):

| row | bits/byte | lost | bits/weight |
| --- | ---: | ---: | ---: |
| embedding | 1.7123 | +0.0000 | 26.44 |
| int8 | 1.7124 | +0.0001 | 8.32 |
| fp8 | 1.7127 | +0.0004 | 8.32 |
| mxfp8 | 1.7119 | -0.0003 | 8.35 |
| int4 | 1.7178 | +0.0055 | 5.88 |
| int4-half | 1.7181 | +0.0058 | 5.88 |
| int4-mse | 1.7172 | +0.0050 | 5.88 |
| int4-stochastic | 1.7213 | +0.0090 | 5.88 |
| int4-gptq | 1.7143 | +0.0020 | 5.88 |
| int4-asymmetric | 1.7153 | +0.0031 | 6.07 |
| nf4 | 1.7178 | +0.0055 | 5.88 |
| nf4-double | 1.7176 | +0.0053 | 5.33 |
| nf4-gptq | 1.7152 | +0.0030 | 5.88 |
| fp4 | 1.7192 | +0.0069 | 5.88 |
| mxfp4 | 1.7203 | +0.0081 | 5.31 |
| mxfp4-even | 1.7200 | +0.0077 | 5.31 |
| mxfp4-gptq | 1.7167 | +0.0044 | 5.31 |
| nvfp4 | 1.7180 | +0.0058 | 5.50 |
| nvfp4-gptq | 1.7156 | +0.0033 | 5.50 |
| q4_0 | 1.7167 | +0.0045 | 5.50 |
| int3 | 1.7418 | +0.0295 | 5.12 |
| int3-gptq | 1.7307 | +0.0185 | 5.12 |
| int2 | 1.8178 | +0.1055 | 4.55 |
| int2-gptq | 1.7884 | +0.0761 | 4.55 |
| ternary | 2.0520 | +0.3398 | 4.36 |

GPTQ takes away between a quarter (int2) and two thirds (int4) of what nearest loses, in
every format and at every width. Among 4-bit formats an asymmetric grid loses least,
then GGUF's q4_0, whose largest value has a code of its own sign; nf4, nvfp4 and other
symmetric integers follow close together, and mxfp4, whose powers of two take a quarter
of the bits of a float32 scale, loses most. At 8 bits all are the same. Bits a weight
are more than those of the codes: with groups of 32 a float32 scale is a whole bit, and
what is neither a matrix nor the embedding stays in float32. One seed, so that
differences below 0.001 say nothing.

Further groups of rows, each run as configs/quantization.py:<group>, on one core each
while other programs ran; bits/byte lost from the same 1.7122.

`:rounding`: how the codes are chosen (int2 is asymmetric, the others symmetric, int8
a channel, groups of 32 else). Calibrated rows are means of three draws of calibration
text, 16,384 tokens each, with their standard deviation; in 0.0001 bits/byte.

| | nearest | HQQ | GPTQ | GPTQ, in turn | learned | AWQ |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| int8 | 1 | – | 1 ± 1 | 1 ± 1 | – | – |
| int4 | 56 | – | 32 ± 2 | 30 ± 2 | 18 ± 4 | 54 |
| int3 | 298 | – | 187 ± 15 | 174 ± 5 | 58 ± 7 | 212 |
| int2 | 1075 | 821 | 725 ± 35 | 677 ± 19 | 212 ± 2 | – |

Learned rounding is ahead wherever there is something to lose: at 3 bits a fifth of what
nearest loses, a third of what GPTQ does. Its grids are those of the least squared
error. Taking the layers in turn, each calibrated on what the rounded ones before it
give, brings GPTQ about one such deviation. AWQ gains little at 4 bits and less
than GPTQ at 3 here, where no channel stands out.

`:activations`, matrices alone rounded, a scale a channel; `dynamic` scales are those of
each token, the others were calibrated:

| weights, activations | nearest | after smoothquant | after rotation |
| --- | ---: | ---: | ---: |
| int8, float | +0.0001 | | |
| int8, int8 dynamic | +0.0002 | +0.0000 | |
| int8, int8 absmax / percentile / mse | +0.0010 / +0.0009 / +0.0008 | | |
| fp8, fp8 dynamic | +0.0006 | | |
| int4, float | +0.0086 | | +0.0079 |
| int4, int8 dynamic | +0.0086 | | |
| int4, int4 dynamic | +0.0312 | +0.0300 | +0.0260 |

Keys and values in int8 lose nothing, in int4 0.0002. A small model without outlier
channels gives smoothing and rotation little to do; of SmolLM2, which has them, rotation
takes away half of what 4-bit activations lose (experiments/quantization).

`:training`: 100 more steps at a tenth of the learning rate. In floats they bring the
model from 1.7122 to 1.6894 (`more`); what is lost is counted from there. `taught` has
the logits of `more` in place of the text's tokens.

| | nearest | GPTQ | qat | qat, taught | lsq | lsq, taught |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| int4 | +0.0056 | +0.0027 | +0.0039 | +0.0083 | +0.0088 | +0.0142 |
| int3 | +0.0293 | +0.0184 | +0.0176 | +0.0210 | +0.0243 | +0.0232 |
| int2 | +0.1207 | +0.0806 | +0.0522 | +0.0476 | +0.0492 | +0.0474 |

At 2 bits training as served is worth it, and a teacher helps; at 3 bits it is level
with GPTQ, which trains nothing; at 4 bits 100 steps with rounded weights cost more than
they repair. LSQ starts from the grids of its paper, which lose more than fitted ones
(1.7297 at 4 bits, where qat starts from 1.7178), and catches up only at 2 bits. Learned
rounding, above, loses less than all of them, of the model before these steps.

`:mixed`: a width of its own for each matrix, 2, 3 or 4 bits in asymmetric groups of
32 with float16 scales, or 8 a channel, under a budget; `gradient` weighs errors by
squared gradients, `output` by what they change of the matrix's outputs.

| bits/weight of matrices | same for all | gradient | output |
| ---: | ---: | ---: | ---: |
| 2.75 | +0.1075 | +0.1075 | +0.1075 |
| 3.25 | | +0.0306 | +0.0358 |
| 3.75 | +0.0158 | +0.0115 | +0.0158 |
| 4.25 | | +0.0050 | +0.0049 |
| 4.75 | +0.0031 | +0.0026 | +0.0031 |

Halfway between two widths a mixture loses half of what the straight line between them
says, and with gradients a quarter less than the same bits for all at 3.75.
"""

import ml_collections

from effjax.core import errors

# Calibration orders and seeds of the rows that are calibrated.
SEEDS = (0, 1, 2)
_INT = {"group": 32}
_WIDTHS = {
  "int8": {"bits": 8},
  "int4": {"bits": 4, **_INT},
  "int3": {"bits": 3, **_INT},
  "int2": {"bits": 2, **_INT, "symmetric": False},
}
# A rotated model has a head of its own, which in the others is the embedding.
_NO_HEAD = {"kind": "matrix", "not_path": "^head$"}
# Name, rounding, options.
_FORMATS = (
  ("int8", "rtn", {"bits": 8}),
  ("fp8", "rtn", {"format": "fp8"}),
  ("mxfp8", "rtn", {"format": "mxfp8"}),
  ("int4", "rtn", {"bits": 4, "group": 32}),
  ("int4-half", "rtn", {"bits": 4, "group": 32, "grid": "half"}),
  ("int4-mse", "rtn", {"bits": 4, "group": 32, "range": "mse"}),
  ("int4-stochastic", "stochastic", {"bits": 4, "group": 32}),
  ("int4-gptq", "gptq", {"bits": 4, "group": 32}),
  ("int4-asymmetric", "rtn", {"bits": 4, "group": 32, "symmetric": False}),
  ("nf4", "rtn", {"format": "nf4", "group": 32}),
  ("nf4-double", "rtn", {"format": "nf4", "group": 32, "double_group": 32}),
  ("nf4-gptq", "gptq", {"format": "nf4", "group": 32}),
  ("fp4", "rtn", {"format": "fp4", "group": 32}),
  ("mxfp4", "rtn", {"format": "mxfp4"}),
  ("mxfp4-even", "rtn", {"format": "mxfp4", "scale_rule": "even"}),
  ("mxfp4-gptq", "gptq", {"format": "mxfp4"}),
  ("nvfp4", "rtn", {"format": "nvfp4"}),
  ("nvfp4-gptq", "gptq", {"format": "nvfp4"}),
  ("q4_0", "rtn", {"format": "gguf", "variant": "q4_0"}),
  ("int3", "rtn", {"bits": 3, "group": 32}),
  ("int3-gptq", "gptq", {"bits": 3, "group": 32}),
  ("int2", "rtn", {"bits": 2, "group": 32, "symmetric": False}),
  ("int2-gptq", "gptq", {"bits": 2, "group": 32, "symmetric": False}),
  ("ternary", "rtn", {"format": "ternary", "group": 32, "per_tensor": False}),
)


def _stage(name, technique, options=None, after="embedding", **more):
  return {
    "name": name,
    "technique": technique,
    "after": after,
    "options": options or {},
    **more,
  }


def _formats(steps):
  """Every format, rounded to nearest and some with GPTQ."""
  del steps
  return tuple(_stage(*row) for row in _FORMATS)


def _rounding(steps):
  """Every rounding at 8, 4, 3 and 2 bits; what is calibrated with three seeds."""
  del steps
  rows = []
  for width, options in _WIDTHS.items():
    rows.append(_stage(f"{width}-nearest", "rtn", options))
    if not options.get("symmetric", True):
      rows.append(_stage(f"{width}-hqq", "hqq", options))
    calibrated = [
      ("gptq", "gptq", "one_shot"),
      ("gptq-true", "gptq", "true_sequential"),
    ]
    if options["bits"] < 8:
      calibrated.append(("adaround", "adaround", "one_shot"))
    for label, technique, order in calibrated:
      rows += [
        _stage(
          f"{width}-{label}-{seed}",
          technique,
          options,
          calibration={"seed": seed, "order": order},
        )
        for seed in SEEDS
      ]
    if options["bits"] in (3, 4):
      rows.append(_stage(f"{width}-scaled", "awq", options))
      rows.append(_stage(f"{width}-awq", "rtn", options, f"{width}-scaled"))
  return tuple(rows)


def _activations(steps):
  """Activations of 8 and 4 bits, and caches; the embedding stays as it is."""
  del steps
  w8a8 = {"bits": 8, "activations": "int8"}
  w4a4 = {"bits": 4, "activations": "int4"}
  static = [
    _stage(f"w8a8-{how}", "rtn", w8a8 | {"activation_scale": how}, "train")
    for how in ("absmax", "percentile", "mse")
  ]
  return (
    _stage("w8", "rtn", {"bits": 8}, "train"),
    _stage("w8a8", "rtn", w8a8, "train"),
    *static,
    _stage("fp8", "rtn", {"format": "fp8", "activations": "fp8"}, "train"),
    _stage("smoothed", "smoothquant", {}, "train"),
    _stage("w8a8-smoothed", "rtn", w8a8, "smoothed"),
    _stage("w4", "rtn", {"bits": 4}, "train"),
    _stage("w4a8", "rtn", {"bits": 4, "activations": "int8"}, "train"),
    _stage("w4a4", "rtn", w4a4, "train"),
    _stage("w4a4-smoothed", "rtn", w4a4, "smoothed"),
    _stage("rotated", "rotation", {}, "train"),
    _stage("w4-rotated", "rtn", {"bits": 4}, "rotated", where=_NO_HEAD),
    _stage("w4a4-rotated", "rtn", w4a4, "rotated", where=_NO_HEAD),
    _stage("kv-int8", "kv_cache", {"format": "int8"}, "train"),
    _stage("kv-int4", "kv_cache", {"format": "int4"}, "train"),
  )


def _training(steps):
  """Weights that were trained as they are served, beside roundings without training.

  `more` is the same training in floats: what the additional steps bring by themselves.
  """
  tuned = _train(max(steps // 4, 1), fraction=0.1)
  taught = tuned | {
    "loss": "logit_kl",
    "loss_options": {"alpha": 1.0},
    "teacher": "more",
  }
  rows = [_stage("more", "train", tuned)]
  for width, options in _WIDTHS.items():
    if options["bits"] == 8:
      continue
    rows.append(_stage(f"{width}-nearest", "rtn", options, "more"))
    rows.append(_stage(f"{width}-gptq", "gptq", options, "more"))
    for technique in ("qat", "lsq"):
      for label, training in (("", tuned), ("-taught", taught)):
        name = f"{width}-{technique}{label}"
        rows += [
          _stage(f"{name}-start", technique, options),
          _stage(f"{name}-train", "train", training, f"{name}-start"),
          _stage(name, "harden", {}, f"{name}-train"),
        ]
  return tuple(rows)


def _mixed(steps):
  """Bits given out under a budget, beside the same bits for all."""
  del steps
  small = {"group": 32, "symmetric": False, "scale_dtype": "float16"}
  uniform = tuple(
    _stage(f"uniform-{bits}", "rtn", {"bits": bits, **small}) for bits in (2, 3, 4)
  )
  # What 2, 3 and 4 bits take with a scale and a zero point for 32 weights.
  budgets = {"2.75": 2.75, "3.75": 3.75, "4.75": 4.75, "3.25": 3.25, "4.25": 4.25}
  return (
    *uniform,
    *(
      _stage(
        f"{sensitivity}-{name}",
        "mixed",
        {"bits_per_weight": bits, "sensitivity": sensitivity},
      )
      for name, bits in budgets.items()
      for sensitivity in ("gradient", "output")
    ),
  )


GROUPS = {
  "": _formats,
  "rounding": _rounding,
  "activations": _activations,
  "training": _training,
  "mixed": _mixed,
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The recipe of a group of rows; "smoke", or "<group>-smoke", only shows it works."""
  group = arg.removesuffix("smoke").removesuffix("-")
  smoke = arg.endswith("smoke")
  if group not in GROUPS:
    known = (*GROUPS, "smoke", *(f"{name}-smoke" for name in GROUPS if name))
    raise errors.unknown("argument of configs/quantization.py:", arg, known[1:])
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
  steps = 20 if smoke else 400
  config.stages = (
    {"name": "train", "technique": "train", "options": _train(steps)},
    {"name": "embedding", "technique": "rtn", "where": {"kind": "embedding"}},
    *GROUPS[group](steps),
  )
  return config


def _train(num_steps, fraction=1.0):
  """Muon; `fraction` scales its learning rate."""
  return {
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
