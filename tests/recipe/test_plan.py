import dataclasses

import jax
import pytest

from effjax.core import config as core_config
from effjax.core import errors, tree
from effjax.models import decoder
from effjax.recipe import config as config_lib
from effjax.recipe import plan as plan_lib
from effjax.recipe import sharing
from effjax.weights.leaves import masked, quantized


def _config(stages, mesh=None, attention=None):
  return core_config.build(
    config_lib.Config,
    {
      "data": {
        "corpus": "synthetic",
        "tokenizer": "bytes",
        "vocab_size": 257,
        "sequence_length": 32,
      },
      "model": {
        "vocab_size": 257,
        "embed_dim": 32,
        "num_layers": 2,
        "mixer_options": {"attention": attention or {"num_heads": 2, "head_dim": 16}},
        "max_len": 256,
      },
      "mesh": mesh or {"num_devices": 1},
      "stages": stages,
    },
  )


_TRAIN = {"name": "train", "technique": "train", "options": {"num_steps": 3}}


def test_shapes_are_those_of_the_real_thing():
  stages = (
    _TRAIN,
    {"name": "pruned", "technique": "magnitude"},
    {"name": "int4", "technique": "rtn", "options": {"bits": 4, "group": 16}},
  )
  plan = plan_lib.make(_config(stages))
  model = decoder.Decoder(plan.config.model)
  params = model.init(jax.random.key(0), *model.example_inputs())["params"]
  assert plan.num_params == sum(a.size for a in jax.tree.leaves(params))
  shapes = lambda t: jax.tree.map(lambda a: (a.shape, a.dtype.name), t)
  assert shapes(plan.outcomes[0].params) == shapes(params)
  leaf = tree.flatten(plan.outcomes[2].params)["run_0/layer_0/mlp/up"]
  assert isinstance(leaf, masked.Masked)
  assert isinstance(leaf.values, quantized.Quantized)
  # Two codes a byte along the contracted axis, one scale for 16 inputs.
  up = params["run_0"]["layer_0"]["mlp"]["up"]
  assert leaf.values.codes.shape == (2, 16, up.shape[-1])
  assert leaf.values.scale.shape == (2, 2, up.shape[-1])


def test_a_stage_with_statistics_is_played_through():
  stages = (_TRAIN, {"name": "g", "technique": "gptq", "options": {"group": 16}})
  plan = plan_lib.make(_config(stages))
  leaf = tree.flatten(plan.outcomes[1].params)["run_0/layer_0/mlp/up"]
  assert isinstance(leaf, quantized.Quantized)
  assert leaf.scale.shape == (2, 2, leaf.shape[-1])


@pytest.mark.parametrize(
  ("stage", "message"),
  [
    ({"technique": "rtn", "options": {"bits": 4, "group": 24}}, "does not divide"),
    ({"technique": "gptq", "options": {"group": 24}}, "does not divide"),
    ({"technique": "rtn", "where": {"path": "nope"}}, "selects no parameter"),
    ({"technique": "rtn", "where": {"kind": "norm"}}, "cannot quantize"),
    (
      {
        "technique": "train",
        "after": "int8",
        "options": {"num_steps": 1},
        "where": {"kind": "matrix"},
      },
      "no trainable parameter",
    ),
  ],
)
def test_what_does_not_fit_is_named_with_its_stage(stage, message):
  stages = (_TRAIN, {"name": "int8", "technique": "rtn"}, {"name": "bad"} | stage)
  stages[2].setdefault("after", "train")
  with pytest.raises(errors.InputError) as caught:
    plan_lib.make(_config(stages))
  assert str(caught.value).startswith("config.stages[2] (bad): ")
  assert message in str(caught.value)


def test_stages_are_laid_out_on_the_mesh():
  stages = (_TRAIN, {"name": "int8", "technique": "rtn"})
  plan = plan_lib.make(_config(stages, {"preset": "fsdp", "num_devices": 4}))
  placed = tree.flatten(plan.shardings(plan.outcomes[1].params))
  codes = placed["run_0/layer_0/mlp/up"].codes
  assert "fsdp" in codes.spec
  assert dataclasses.asdict(plan.config)["mesh"]["preset"] == "fsdp"


def _sparse(**section):
  options = {"num_steps": 30, "sparsity": section}
  return {"name": "sparse", "technique": "train", "options": options}


def test_a_stage_that_makes_sparse_hands_on_masks():
  section = {"name": "rigl", "sparsity": 0.9, "options": {"every": 5}}
  stages = (_sparse(**section), {"name": "int8", "technique": "rtn"})
  plan = plan_lib.make(_config(stages))
  leaves = [tree.flatten(o.params)["run_0/layer_0/mlp/up"] for o in plan.outcomes]
  assert isinstance(leaves[0], masked.Masked)
  assert leaves[0].values.shape == plan.fresh["run_0"]["layer_0"]["mlp"]["up"].shape
  assert isinstance(leaves[1].values, quantized.Quantized)
  filled = plan.config.stages[0].options["sparsity"]
  assert filled["options"]["drop_fraction"] == 0.3 and filled["budget"] == "uniform"
  # The resolved config, as config.json holds it, is the same config.
  again = config_lib.from_dict(core_config.to_dict(plan.config))
  assert again == plan.config


@pytest.mark.parametrize(
  ("first", "section", "message"),
  [
    ({"technique": "magnitude"}, {}, "is already pruned and keeps its mask"),
    ({"technique": "rtn"}, {}, "no trainable parameter|is a quantized leaf"),
    ({"technique": "train"}, {"sparsity": 0.9999}, "nothing would be left of run_0/"),
    ({"technique": "train"}, {"where": {"kind": "norm"}}, "of kind 'norm' sparse"),
  ],
)
def test_what_cannot_be_made_sparse_shows_before_anything_runs(first, section, message):
  values = {"name": "rigl", "sparsity": 0.9, "options": {"every": 5}} | section
  if first["technique"] == "train":
    first = _TRAIN
  stages = ({"name": "first", "after": "init"} | first, _sparse(**values))
  with pytest.raises(errors.InputError, match=message) as caught:
    plan_lib.make(_config(stages))
  assert str(caught.value).startswith("config.stages[1] (sparse): ")


def test_key_heads_that_do_not_divide_are_noted():
  mqa = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
  plan = lambda mesh: plan_lib.make(_config((_TRAIN,), mesh, mqa))
  assert sharing.notes(plan(None)) == []
  (line,) = sharing.notes(plan({"preset": "tp", "num_devices": 2}))
  assert line.startswith("key heads are whole on each of the 2 devices along 'tensor'")
