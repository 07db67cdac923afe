"""What devices must be able to share is checked before anything starts."""

import pytest

from effjax.core import errors
from effjax.recipe import config as config_lib
from effjax.recipe import plan as plan_lib
from effjax.recipe import runner, sharing
from tests.recipe import tiny


def _plan(tmp_path, mesh, **options):
  training = {
    "name": "train",
    "technique": "train",
    "options": {"num_steps": 1} | options,
  }
  reference = tiny.write(tmp_path, [training])
  changes = [f"--config.mesh.{name}={value}" for name, value in mesh.items()]
  return plan_lib.make(config_lib.load(reference, changes))


def test_a_batch_that_does_not_divide_among_devices(tmp_path):
  plan = _plan(tmp_path, {"num_devices": 4})
  with pytest.raises(errors.InputError) as caught:
    sharing.check(plan, 0)
  assert str(caught.value) == (
    "config.stages[0] (train): a batch of 2 sequences does not divide among 4 "
    "devices; make data.batch_size, or the stage's own, a multiple of 4"
  )
  # A stage that does not run does not matter, and a stage may have a batch of its own.
  sharing.check(plan, -1)
  sharing.check(_plan(tmp_path, {"num_devices": 4}, batch_size=8), 0)
  # Devices that split something else share the rows.
  sharing.check(_plan(tmp_path, {"num_devices": 2, "preset": "tp"}), 0)


def test_a_batch_that_does_not_divide_into_micro_batches(tmp_path):
  plan = _plan(tmp_path, {"num_devices": 2}, micro_batches=4)
  with pytest.raises(errors.InputError, match="do not divide into micro_batches=4"):
    sharing.check(plan, 0)


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
