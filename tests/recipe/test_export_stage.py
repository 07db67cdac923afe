"""Recipes that export, and recipes of pruning as they are planned."""

import json
import pathlib
import shutil

import pytest

from effjax.core import errors
from effjax.core import tree as tree_lib
from effjax.recipe import config as config_lib
from effjax.recipe import plan as plan_lib
from effjax.recipe import runner
from effjax.weights.leaves import masked, quantized
from tests.recipe import tiny

ROOT = pathlib.Path(__file__).parents[2]


def _write(folder, **options):
  stages = (
    {"name": "pruned", "technique": "magnitude"},
    {"name": "int8", "technique": "rtn", "options": {"bits": 8, "group": 0}},
    {"name": "exported", "technique": "export", "options": options},
  )
  return tiny.write(folder, stages)


def test_an_export_stands_in_the_run_folder_and_is_written_again(tmp_path):
  onnx = pytest.importorskip("onnx")
  reference = _write(tmp_path, format="onnx", type="int8")
  root = runner.run(reference, workdir=tmp_path / "run")
  rows = json.loads((root / "result.json").read_text())["stages"]
  exported = root / "exports" / "exported.onnx"
  first = exported.read_bytes()
  assert rows[-1]["bytes_on_disk"] == len(first) != rows[-2]["bytes_on_disk"]
  assert rows[-1]["quality"] == rows[-2]["quality"]
  # Masked codes are written as codes, of which half are zero.
  graph = onnx.load_from_string(first).graph
  held = [onnx.numpy_helper.to_array(t) for t in graph.initializer]
  codes = [a for a in held if a.dtype == "int8" and a.ndim == 2 and 257 not in a.shape]
  zeros = sum((a == 0).sum() for a in codes) / sum(a.size for a in codes)
  assert zeros > 0.45
  # As if it had been killed before the stage was whole.
  (stage,) = (root / "stages").glob("*-exported")
  shutil.rmtree(stage)
  (root / "result.json").unlink()
  exported.write_bytes(b"half")
  runner.run(reference, workdir=root)
  assert exported.read_bytes() == first


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"format": "onx"}, "unknown format 'onx'; did you mean 'onnx'"),
    ({"format": "onnx", "type": "int3"}, "unknown type of format 'onnx' 'int3'"),
    ({"format": "hf", "type": "int8"}, "type belongs to format gguf or onnx"),
    ({"format": "hf", "architecture": "lama"}, "lama"),
    ({"format": "hf"}, "masked"),
    (
      {"format": "onnx"},
      "is a mask over a quantized leaf, which ONNX type fp32 cannot",
    ),
    ({"format": "gguf"}, "is a masked leaf, which a GGUF file cannot hold"),
  ],
)
def test_mistakes_show_before_anything_runs(tmp_path, options, message):
  reference = _write(tmp_path, **options)
  with pytest.raises(errors.InputError) as caught:
    runner.run(reference, workdir=tmp_path / "run")
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "run").exists()


def test_a_pruned_model_is_plain_enough_for_hugging_face(tmp_path):
  stages = (
    {"name": "pruned", "technique": "magnitude"},
    {"name": "exported", "technique": "export", "options": {"format": "hf"}},
  )
  plan = plan_lib.make(config_lib.load(tiny.write(tmp_path, stages)))
  leaves = tree_lib.flatten(plan.outcomes[-1].params).values()
  assert any(isinstance(leaf, masked.Masked) for leaf in leaves)


def test_the_pipeline_is_pruned_to_half_and_ends_in_codes():
  path = str(ROOT / "configs" / "pipeline.py")
  for arg in ("", ":smoke"):
    plan = plan_lib.make(config_lib.load(path + arg))
  names = [stage.name for stage in plan.config.stages]
  made = dict(zip(names, plan.outcomes, strict=True))
  for name in ("gradual", "distilled", "tuned"):
    leaf = tree_lib.flatten(made[name].params)["run_0/layer_0/mlp/up"]
    assert isinstance(leaf, masked.Masked)
  leaf = tree_lib.flatten(made["exported"].params)["run_0/layer_0/mlp/up"]
  assert isinstance(leaf.values, quantized.Quantized)


def _planned(arg):
  plan = plan_lib.make(config_lib.load(str(ROOT / "configs" / "structured.py") + arg))
  return dict(zip([s.name for s in plan.config.stages], plan.outcomes, strict=True))


def test_layers_are_planned_by_every_score():
  rows = _planned(":smoke")
  scores = ("random", "magnitude", "wanda", "taylor", "fisher", "influence", "loss")
  for score in scores:
    assert rows[f"layers-{score}-0"].model.config.num_layers == 1


@pytest.mark.slow
def test_groups_are_planned_by_every_score():
  rows = _planned("")
  heads = rows["heads-fisher-0"].model.config.layers[1].mixer_options
  assert (heads["num_heads"], heads["num_kv_heads"]) == (2, 2)
  assert rows["layers-loss-2"].model.config.num_layers == 4
