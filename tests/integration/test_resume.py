"""A run that was killed or stopped anywhere ends as if it never had been."""

import random
import signal

import jax
import numpy as np
import pytest

from effjax.core import tree
from effjax.train import stages
from effjax.weights.leaves import masked

_STAGES = ("1-train", "2-int8", "3-pruned", "4-tuned", "5-int4")


def _training_at(command, stage, step):
  """Whether the training of a stage has logged a step."""

  def reached(workdir):
    rows = command.metrics(workdir)
    return any(row["stage"] == stage and row["step"] >= step for row in rows)

  return reached


def _check_equal(command, workdir, finished):
  done = command.run(workdir)
  assert done.returncode == 0, done.stderr
  assert command.metrics(workdir) == command.metrics(finished)
  assert command.result(workdir) == command.result(finished)
  for stage in _STAGES:
    found, expected = (
      stages.load_stage(root / "stages" / stage) for root in (workdir, finished)
    )
    assert found.model == expected.model
    arrays = jax.tree.leaves(expected.params)
    for a, b in zip(jax.tree.leaves(found.params), arrays, strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_killed_killed_and_stopped(command, finished, tmp_path):
  """Kill at a step, kill in a stage, SIGTERM in a training; then run to the end."""
  workdir = tmp_path / "run"
  # The checkpoints are at steps 3, 6, ...: what came after the last one is done again.
  at = _training_at(command, "train", 8)
  code, _, _ = command.signal_when(workdir, at, signal.SIGKILL)
  assert code == -signal.SIGKILL
  assert not (workdir / "stages" / "1-train").exists()

  # Stage 3 has begun when the folder of stage 2 stands.
  begun = lambda workdir: (workdir / "stages" / "2-int8").exists()
  code, log, _ = command.signal_when(workdir, begun, signal.SIGKILL)
  assert code == -signal.SIGKILL
  assert "train: resuming at step" in log
  assert not (workdir / "stages" / "3-pruned").exists()

  at = _training_at(command, "tuned", 2)
  code, log, secs = command.signal_when(workdir, at, signal.SIGTERM)
  assert code == 4, log
  assert "[2/5] int8: done before" in log
  assert "the same command resumes" in log.splitlines()[-1]
  assert secs < 60, "the bound is 10 s after the step; the machine may be busy"

  _check_equal(command, workdir, finished)


def test_finished_run_is_left_alone(command, finished):
  before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
  done = command.run(finished)
  assert done.returncode == 0, done.stderr
  after = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
  changed = {p.name for p in before if before[p] != after.get(p)}
  assert changed <= {".lock"}
  assert before.keys() == after.keys()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(command, finished, tmp_path, seed):
  """Three kills at random places, in trainings and between them."""
  draw = random.Random(seed)
  workdir = tmp_path / "run"
  for _ in range(3):
    place = draw.choice(["step", "stage"])
    if place == "step":
      at = _training_at(command, *draw.choice([("train", 11), ("tuned", 6)]))
      delay = draw.randint(0, 40)
    else:
      stage = draw.choice(_STAGES)
      at = lambda workdir, stage=stage: (workdir / "stages" / stage).exists()
      delay = draw.randint(0, 400)
    polls = iter(range(10**6))
    reached = lambda workdir, at=at, delay=delay, polls=polls: (
      at(workdir) and next(polls) >= delay
    )
    code, log, _ = command.signal_when(workdir, reached, signal.SIGKILL)
    # 0: a late place was drawn, and the run was faster.
    assert code in (-signal.SIGKILL, 0), log
  _check_equal(command, workdir, finished)


@pytest.mark.slow
def test_hybrid_killed_and_resumed(command, tmp_path):
  """The same with a Mamba-2 layer, whose state and kernels are others."""
  command.config = command.folder / "tiny.py:hybrid"
  try:
    whole = tmp_path / "whole"
    assert command.run(whole).returncode == 0
    workdir = tmp_path / "run"
    at = _training_at(command, "tuned", 4)
    command.signal_when(workdir, at, signal.SIGKILL)
    _check_equal(command, workdir, whole)
  finally:
    command.config = command.folder / "tiny.py"


@pytest.mark.slow
def test_sparse_training_killed_and_resumed(command, tmp_path):
  """Killed between two changes of the masks; the masks are handed on and kept."""
  command.config = command.folder / "tiny.py:sparse"
  try:
    whole = tmp_path / "whole"
    done = command.run(whole)
    assert done.returncode == 0, done.stderr
    workdir = tmp_path / "run"
    at = _training_at(command, "pruned", 5)
    command.signal_when(workdir, at, signal.SIGKILL)
    _check_equal(command, workdir, whole)
    rows = command.metrics(whole)
    logged = [r["sparsity"] for r in rows if r["stage"] == "pruned" and "loss" in r]
    assert logged == pytest.approx([0.5] * 9)
    sparse, tuned = (stages.load_stage(whole / "stages" / s) for s in _STAGES[2:4])
    flat = tree.flatten(sparse.params)
    leaves = {p: x for p, x in flat.items() if isinstance(x, masked.Masked)}
    assert len(leaves) >= 5
    for path, leaf in leaves.items():
      np.testing.assert_array_equal(
        leaf.mask(), tree.flatten(tuned.params)[path].mask()
      )
  finally:
    command.config = command.folder / "tiny.py"


@pytest.mark.slow
def test_killed_on_one_device_and_resumed_on_eight(command, finished, tmp_path):
  workdir = tmp_path / "run"
  at = _training_at(command, "train", 8)
  command.signal_when(workdir, at, signal.SIGKILL)
  done = command.run(workdir, JAX_NUM_CPU_DEVICES="8")
  assert done.returncode == 0, done.stderr
  assert "resuming in another environment: env.num_devices: 1 -> 8" in done.stderr
  losses = lambda root: {
    (r["stage"], r["step"]): r["loss"] for r in command.metrics(root) if "loss" in r
  }
  found, expected = losses(workdir), losses(finished)
  assert found == pytest.approx(expected, rel=1e-3)
  assert found["train", 7] == pytest.approx(expected["train", 7], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "devices"), [("fsdp", 8), ("tp", 2)])
def test_devices_give_the_same_table(command, finished, tmp_path, preset, devices):
  workdir = tmp_path / "run"
  flag = f"--config.mesh.preset={preset}"
  done = command.run(workdir, flag, JAX_NUM_CPU_DEVICES=str(devices))
  assert done.returncode == 0, done.stderr
  pairs = zip(
    command.result(workdir)["stages"], command.result(finished)["stages"], strict=True
  )
  for found, expected in pairs:
    loss = expected["quality"]["loss"]
    assert found["quality"]["loss"] == pytest.approx(loss, rel=1e-3)
    for name in ("bytes_held", "bytes_on_disk", "flops_per_token"):
      assert found[name] == expected[name]


@pytest.mark.slow
def test_divergence_is_exit_3_with_a_report(command, tmp_path):
  workdir = tmp_path / "run"
  flag = "--config.stages[0].options.optimizer.learning_rate=1e30"
  done = command.run(workdir, flag)
  assert done.returncode == 3, done.stderr
  assert "train diverged at step" in done.stderr.splitlines()[-1]
  assert (workdir / "diverged-train.json").exists()
  assert not (workdir / "result.json").exists()
