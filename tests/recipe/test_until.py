"""A run can stop after a stage."""

import pytest

from effjax.core import errors
from effjax.recipe import runner
from tests.recipe import tiny


def test_until(tmp_path):
  """The run stops after a stage, without a report, and goes on from there."""
  stages = [
    {"name": "train", "technique": "train", "options": {"num_steps": 1}},
    {"name": "int8", "technique": "rtn"},
  ]
  reference = tiny.write(tmp_path, stages)
  with pytest.raises(errors.InputError, match="unknown stage of --until 'trian'"):
    runner.run(reference, workdir=tmp_path / "run", until="trian")
  assert not (tmp_path / "run").exists()
  root = runner.run(reference, workdir=tmp_path / "run", until="train")
  assert [p.name for p in (root / "stages").iterdir()] == ["1-train"]
  assert not (root / "result.json").exists()
  runner.run(reference, workdir=root)
  assert (root / "stages" / "2-int8").exists() and (root / "result.json").exists()
