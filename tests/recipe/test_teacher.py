"""A recipe whose quantized copy learns from its full-precision model."""

import dataclasses

import pytest

from effjax.core import config as core_config
from effjax.core import errors, tree
from effjax.recipe import config as config_lib
from effjax.recipe import plan as plan_lib
from effjax.weights.leaves import fake_quantized, quantized

TRAIN = {"name": "train", "technique": "train", "options": {"num_steps": 3}}
LEARN = {"num_steps": 2, "loss": "logit_kl", "teacher": "train"}
STAGES = (
  TRAIN,
  {"name": "lsq", "technique": "lsq", "options": {"bits": 3}},
  {"name": "tune", "technique": "train", "options": LEARN},
  {"name": "hard", "technique": "harden"},
)


def _config(*stages):
  values = {
    "data": {"corpus": "synthetic", "tokenizer": "bytes", "vocab_size": 257},
    "model": {
      "vocab_size": 257,
      "embed_dim": 32,
      "num_layers": 1,
      "mixer_options": {"attention": {"num_heads": 2, "head_dim": 16}},
      "max_len": 256,
    },
    "mesh": {"num_devices": 1},
    "stages": stages,
  }
  return core_config.build(config_lib.Config, values)


def test_quantization_aware_distillation_is_four_stages():
  plan = plan_lib.make(_config(*STAGES))
  assert [plan.config.teacher(i) for i in range(4)] == [None, None, 0, None]
  leaves = [tree.flatten(o.params)["run_0/layer_0/mlp/up"] for o in plan.outcomes]
  assert isinstance(leaves[2], fake_quantized.FakeQuantized)
  assert isinstance(leaves[3], quantized.Quantized) and leaves[3].bits == 3


@pytest.mark.parametrize(
  ("stages", "message"),
  [
    (
      (TRAIN, TRAIN | {"name": "b", "options": LEARN | {"teacher": "b"}}),
      r"stages\[1\] \(b\): teacher='b' is not an earlier stage; .* are: train$",
    ),
    (
      (TRAIN | {"options": LEARN},),
      "teacher='train' is not an earlier stage; .* none$",
    ),
    (
      (TRAIN, TRAIN | {"name": "b", "options": LEARN | {"teacher": None}}),
      "loss='logit_kl' needs a teacher",
    ),
    (
      (TRAIN, {"name": "hard", "technique": "harden"}),
      "harden found no fake-quantized weight",
    ),
  ],
)
def test_mistakes_are_named_before_anything_runs(stages, message):
  with pytest.raises(errors.InputError, match=message) as error:
    plan_lib.make(_config(*stages))
  assert "\n" not in str(error.value)


def test_another_vocabulary_is_refused():
  plan = plan_lib.make(_config(TRAIN))
  config = dataclasses.replace(plan.model.config, vocab_size=300)
  with pytest.raises(errors.InputError, match="vocabulary of 300, the student of 257"):
    plan_lib._check_teacher(plan.model.clone(config=config), plan.model)
