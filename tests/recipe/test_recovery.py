"""The recipe that recovers pruned and rounded models: what rows hold, and a run."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from effjax.core import errors
from effjax.core import tree as tree_lib
from effjax.recipe import config as config_lib
from effjax.recipe import files
from effjax.recipe import plan as plan_lib
from effjax.weights.leaves import adapted, masked, quantized

ROOT = pathlib.Path(__file__).parents[2]
PATH = str(ROOT / "configs" / "recovery.py")


def _kinds(leaf):
  """Kinds of a leaf and of what it is made of, outermost first."""
  if isinstance(leaf, masked.Masked):
    return ("masked", *_kinds(leaf.values))
  if isinstance(leaf, adapted.Adapted):
    return ("adapted", *_kinds(leaf.base))
  return ("codes",) if isinstance(leaf, quantized.Quantized) else ("array",)


HELD = {
  "train": ("array",),
  "pruned": ("masked", "array"),
  "whole-0.003": ("masked", "array"),
  "lora-0.01": ("masked", "adapted", "array"),
  "lora-merged": ("masked", "array"),
  "beside": ("adapted", "masked", "array"),
  "beside-cut": ("masked", "array"),
  "beside-dense": ("array",),
  "int3-lora": ("adapted", "codes"),
  "int3-merged": ("array",),
  "int3-again": ("codes",),
}


@pytest.mark.parametrize("argument", ["", ":smoke"])
def test_rows_hold_what_they_are_named_after(argument):
  plan = plan_lib.make(config_lib.load(PATH + argument))
  stages = zip(plan.config.stages, plan.outcomes, strict=True)
  outcomes = {stage.name: made for stage, made in stages}
  for name, kinds in HELD.items():
    made = outcomes[name]
    flat = tree_lib.flatten(made.params)
    for path, spec in tree_lib.flatten(made.specs).items():
      assert _kinds(flat[path]) == (kinds if spec.kind == "matrix" else ("array",))
  size = lambda name: sum(a.size for a in jax.tree.leaves(outcomes[name].params))
  assert size("lora-merged") == size("pruned") < size("lora-0.01")


def test_another_argument_is_refused():
  with pytest.raises(errors.InputError, match="did you mean 'smoke'"):
    files.read(f"{PATH}:smokey")


@pytest.mark.slow
def test_smoke_runs_and_merging_changes_nothing(tmp_path):
  command = [sys.executable, "-m", "effjax", "run", "--config", f"{PATH}:smoke"]
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  subprocess.run([*command, "--workdir", tmp_path / "run"], check=True, env=env)
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  rows = {row["stage"]: row for row in result["stages"]}
  assert HELD.keys() <= rows.keys()
  loss = lambda name: rows[name]["quality"]["loss"]
  starts = {"lora-start": "pruned", "beside-start": "pruned", "int3-start": "int3"}
  for start, before in starts.items():
    assert loss(start) == pytest.approx(loss(before), rel=1e-5)
  assert loss("lora-merged") == pytest.approx(loss("lora-0.01"), rel=1e-5)
  assert loss("lora-0.01") < loss("pruned")
  assert loss("int3-lora") < loss("int3")
  pruned, merged = rows["pruned"], rows["lora-merged"]
  for name in ("num_params", "num_nonzero", "bytes_held", "flops_per_token"):
    assert merged[name] == pruned[name]
