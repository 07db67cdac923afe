"""The loop: complete metrics, resume, signals, divergence, full disks."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.train import checkpoint, loop, overhead, writers
from effjax.weights.leaves import masked

CHILD = """
import importlib.util, os, pathlib, signal
import jax
spec = importlib.util.spec_from_file_location("toys", {conftest!r})
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)

def hook(step):
  if step == 5:
    os.kill(os.getpid(), signal.SIGKILL)

toys.make_toy().loop(pathlib.Path({workdir!r}), batches=toys.Hooked(hook)).run()
"""


def _rows(workdir):
  rows = writers.read(workdir / "metrics.jsonl")
  return [{k: v for k, v in row.items() if k not in writers.TIMED} for row in rows]


def _same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


class CrashError(Exception):
  """What a test breaks a run with."""


def _crash_at(step):
  def hook(given):
    if given == step:
      raise CrashError

  return hook


def _signal_at(step, number):
  def hook(given):
    if given == step:
      os.kill(os.getpid(), number)

  return hook


@pytest.fixture(scope="module")
def straight(toy, tmp_path_factory):
  """Workdir and last state of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("straight")
  return workdir, toy.loop(workdir).run()


def test_train_end_to_end(toy, tmp_path, capsys):
  config = toy.config(num_steps=40, log_every=7, eval_every=20, checkpoint_every=0)
  evaluate = lambda params: {"loss": float(jnp.sum(params["up"]))}
  run = lambda: loop.train(
    **toy.arguments(config=config), workdir=tmp_path, evaluate=evaluate
  )
  result = run()
  rows = _rows(tmp_path)
  assert [r["step"] for r in rows if "loss" in r] == [7, 14, 21, 28, 35, 40]
  assert [r["step"] for r in rows if "eval_loss" in r] == [20, 40]
  assert rows[-2]["loss"] == result.metrics["loss"] < 0.8 * rows[0]["loss"]
  assert rows[-1]["eval_loss"] == result.evaluation["loss"]
  assert result.num_compilations == 1
  assert result.tokens == rows[-2]["tokens"] > 0
  captured = capsys.readouterr()
  assert captured.out == ""
  lines = captured.err.splitlines()
  assert lines[0].startswith("step 7/40 (17.5%) | loss ")
  assert " tok/s | mfu n/a | mem " in lines[1]
  # The run is finished: the same call again only reads the result back.
  again = run()
  _same(again.params, result.params)
  assert again.num_compilations == 0 and _rows(tmp_path) == rows
  assert again.tokens == result.tokens and again.evaluation == result.evaluation


def test_killed_and_resumed_equals_never_killed(
  toy, tmp_path, subprocess_env, straight
):
  conftest = pathlib.Path(__file__).with_name("conftest.py")
  script = CHILD.format(conftest=str(conftest), workdir=str(tmp_path))
  # Compiled as this process compiles what it is resumed with.
  env = subprocess_env | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
  done = subprocess.run(
    [sys.executable, "-c", script], env=env, capture_output=True, text=True
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  # Metrics past the checkpoint were written, and the last line may be torn.
  assert max(row["step"] for row in _rows(tmp_path)) == 4
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"stage": "train", "st')
  _same(toy.loop(tmp_path).run(), straight[1])
  assert _rows(tmp_path) == _rows(straight[0])


@pytest.mark.parametrize("step", [0, 1, 4, 5])
def test_a_crash_at_any_step_changes_nothing(toy, tmp_path, step, straight):
  with pytest.raises(CrashError):
    toy.loop(tmp_path, batches=toy.hooked(_crash_at(step))).run()
  _same(toy.loop(tmp_path).run(), straight[1])
  assert _rows(tmp_path) == _rows(straight[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(toy, tmp_path, number, straight):
  before = signal.getsignal(number)
  config = toy.config(checkpoint_every=0)
  stopping = toy.loop(tmp_path, config, toy.hooked(_signal_at(2, number)))
  start = time.monotonic()
  with pytest.raises(errors.StoppedError, match="saved at step 3 of 6") as stopped:
    stopping.run()
  assert time.monotonic() - start < 10
  assert stopped.value.exit_code == 4 and signal.getsignal(number) is before
  assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3]
  _same(toy.loop(tmp_path, config).run(), straight[1])
  assert _rows(tmp_path) == _rows(straight[0])


def test_a_signal_cuts_an_evaluation_short_and_it_is_repeated(toy, tmp_path):
  calls = []

  def evaluate(params):
    calls.append(1)
    if len(calls) == 1:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.01)
      raise AssertionError("the evaluation went on")
    return {"loss": 1.0}

  config = toy.config(eval_every=3, checkpoint_every=0)
  with pytest.raises(errors.StoppedError, match="step 3"):
    toy.loop(tmp_path, config, evaluate=evaluate).run()
  assert all("eval_loss" not in row for row in _rows(tmp_path))
  toy.loop(tmp_path, config, evaluate=evaluate).run()
  rows = _rows(tmp_path)
  assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]
  assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_stop_without_a_folder_says_that_nothing_was_saved(toy):
  with pytest.raises(errors.StoppedError, match="nothing to save to"):
    toy.loop(batches=toy.hooked(_signal_at(1, signal.SIGTERM))).run()


@pytest.mark.parametrize("step", [0, 4])
def test_divergence_is_reported_and_never_saved(toy, tmp_path, step):
  poisoned = toy.batch()
  poisoned["weights"] = poisoned["weights"] * jnp.nan
  hook = lambda given: poisoned if given == step else None
  config = toy.config(checkpoint_every=1)
  with pytest.raises(errors.DivergedError, match="diverged at step") as diverged:
    toy.loop(tmp_path, config, toy.hooked(hook)).run()
  assert diverged.value.exit_code == 3 and "\n" not in str(diverged.value)
  report = json.loads((tmp_path / "diverged-train.json").read_text())
  assert report["step"] == step + 1 and report["metrics"]["loss"] == "nan"
  assert [row["step"] for row in _rows(tmp_path)] == list(range(1, step + 1))
  saved = [int(p.name) for p in (tmp_path / "checkpoints/train").glob("[0-9]*")]
  assert max(saved, default=None) == report["last_checkpoint"] == (step or None)


def test_a_full_disk_leaves_the_previous_checkpoint(
  toy, tmp_path, monkeypatch, straight
):
  save = checkpoint.ocp.CheckpointManager.save

  def full(self, step, **kwargs):
    if step >= 4:
      raise ValueError("RESOURCE_EXHAUSTED: write: No space left on device")
    return save(self, step, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    with pytest.raises(OSError, match="No space left") as error:
      toy.loop(tmp_path).run()
  assert error.value.errno == 28 and str(tmp_path) in str(error.value)
  assert (tmp_path / "checkpoints/train/2").is_dir()
  _same(toy.loop(tmp_path).run(), straight[1])
  assert _rows(tmp_path) == _rows(straight[0])


def test_a_damaged_checkpoint_falls_back(toy, tmp_path, capsys, straight):
  with pytest.raises(CrashError):
    toy.loop(tmp_path, batches=toy.hooked(_crash_at(5))).run()
  folder = tmp_path / "checkpoints/train/4/state"
  data = max(folder.glob("d/*"), key=lambda path: path.stat().st_size)
  data.write_bytes(data.read_bytes()[:-10])
  capsys.readouterr()
  _same(toy.loop(tmp_path).run(), straight[1])
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith("checkpoint of step 4 is damaged")
  assert lines[1] == "train: resuming at step 2"
  assert _rows(tmp_path) == _rows(straight[0])


def test_the_position_in_the_data_is_a_number_beside_the_arrays(
  toy, tmp_path, monkeypatch, straight
):
  """And what was written when grain kept it in a file of its own is read as well."""
  with pytest.raises(CrashError):
    toy.loop(tmp_path, batches=toy.hooked(_crash_at(5))).run()
  folder = tmp_path / "checkpoints/train/4"
  meta = json.loads((folder / "meta/metadata").read_text())
  assert meta["position"] == {"next_index": 4}
  assert not (folder / "data").exists()

  save = checkpoint.ocp.CheckpointManager.save

  def old(self, step, args):
    del args.meta.item["position"]
    batches = checkpoint.grain.checkpoint.CheckpointSave(given)
    data = checkpoint.ocp.args.Composite(**args, data=batches)
    return save(self, step, args=data)

  other = tmp_path / "old"
  given = toy.hooked(_crash_at(5))
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp.CheckpointManager, "save", old)
    with pytest.raises(CrashError):
      toy.loop(other, batches=given).run()
  assert (other / "checkpoints/train/4/data").exists()
  for root in (tmp_path, other):
    _same(toy.loop(root).run(), straight[1])


def test_another_config_cannot_continue(toy, tmp_path):
  toy.loop(tmp_path).run()
  with pytest.raises(errors.InputError, match=r"config\.log_every: 1 -> 2"):
    toy.loop(tmp_path, toy.config(log_every=2)).run()


def test_data_that_ends_says_so(toy):
  with pytest.raises(errors.InputError, match="ended after 1 of 6 steps"):
    toy.loop(batches=iter([toy.batch()])).run()


def test_pruned_weights_stay_pruned(toy):
  mask = jnp.asarray(np.random.default_rng(0).random((8, 16)) < 0.5)
  params = toy.params | {"up": masked.Masked.create(toy.params["up"], mask)}
  result = loop.train(**toy.arguments(params=params), where={"path": "up|down"})
  up = result.params["up"]
  assert isinstance(up, masked.Masked)
  np.testing.assert_array_equal(up.mask(), mask)
  kept = np.asarray(mask)
  np.testing.assert_array_equal(np.asarray(up.values)[~kept], 0)
  assert np.asarray(up.values != toy.params["up"])[kept].all()
  # What `where` leaves out comes back as it was.
  np.testing.assert_array_equal(result.params["table"], toy.params["table"])


def test_resume_on_eight_devices(toy, tmp_path, straight):
  with pytest.raises(CrashError):
    toy.loop(tmp_path, batches=toy.hooked(_crash_at(3))).run()
  step, start = toy.build(preset="fsdp", num_devices=8)
  state = loop.Loop(step, start(), toy.batches(), toy.config(), workdir=tmp_path).run()
  for name, array in state.params.items():
    assert len(array.sharding.device_set) == 8
    np.testing.assert_allclose(
      array, straight[1].params[name], rtol=1e-5, atol=1e-6, err_msg=name
    )


def test_overhead_is_measured(toy):
  step, start = toy.plain
  config = toy.config(num_steps=3, log_every=100)
  found = overhead.measure(step, start, toy.batch(), config, repeats=1)
  assert found["raw_secs"] > 0 and found["loop_secs"] > 0


def test_nothing_is_compiled_twice(toy, tmp_path):
  # Not after step 2, nor for a state that was just restored.
  step, start = toy.build()
  make = lambda: loop.Loop(step, start(), toy.batches(), toy.config(), workdir=tmp_path)
  make().run()
  (tmp_path / "checkpoints/train/6").rename(tmp_path / "gone")
  make().run()
  assert step.num_compilations() == 1
