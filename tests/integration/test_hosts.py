"""A recipe in several processes: the numbers of one, one writer, and ends of all kinds.

Two and four processes on this machine stand for hosts. What they say to each other is
tested in tests/parallel/test_hosts.py; here they run recipes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from effjax.recipe import folder
from tests import processes
from tests.integration import several


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return several.make(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def one(runs):
  """A run of one process with one device."""
  runs.finish(1, "one", "--dist=off", devices=1)
  return "one"


@pytest.fixture(scope="module")
def slurm(runs):
  return several.slurm(runs)


@pytest.fixture(scope="module")
def two(runs, slurm):
  """A run of two processes with two devices each, that nothing disturbed; by Slurm.

  Returns:
    The run folder's name, stdout of all processes, and our lines of each one's stderr.
  """
  args = ("--config", "tiny.py", "--workdir", runs.folder / "two")
  done, asked, _ = slurm(*args, "--config.mesh.preset=fsdp")
  texts = [(runs.folder / f"task-{i}.stderr").read_text() for i in range(2)]
  assert done.returncode == 0 and asked == "", (done.stderr, texts)
  return "two", done.stdout, [processes.lines(text) for text in texts]


def test_two_processes_give_the_numbers_of_one(runs, one, two):
  workdir, out, (first, second) = two
  runs.check_same(workdir, one, 1e-6)
  assert first[0].startswith("2 processes (Slurm, coordinator localhost:")
  assert first[0].endswith("4 devices (cpu)")
  expected = "mesh fsdp=4 (fsdp); 2 different shares of a batch are read by 2 processes"
  assert first[1] == expected
  # Process 0 alone says and writes anything but its part of the arrays.
  assert out.count("bits/byte") == 1 and second == []
  root = runs.folder / workdir
  env = json.loads((root / "env.json").read_text())
  assert (env["num_processes"], env["num_devices"]) == (2, 4)
  assert len(list((root / "tb" / "train").iterdir())) == 1
  arrays = root / "stages" / "1-train" / "params"
  names = {path.name for path in arrays.glob("ocdbt.process_*")}
  assert names == {"ocdbt.process_0", "ocdbt.process_1"}


@pytest.mark.slow
def test_killed_and_stopped_in_an_evaluation(runs, two):
  """kill -9 in the training, then SIGTERM in an evaluation; the end is the same."""
  workdir, preset = "ended", "--config.mesh.preset=fsdp"
  with runs.start(2, workdir, preset) as job:
    job.when(lambda: runs.step(workdir) >= 7).send(1, signal.SIGKILL)
    ended = job.wait(60)
  assert [end.code for end in ended] == [1, -signal.SIGKILL]
  dead = f"pid {job.processes[1].pid}) is dead or cut off: no heartbeat for 8 s"
  assert dead in ended[0].lines[-1]

  # The evaluation begins when the step before it is logged.
  with runs.start(2, workdir, preset, config="tiny.py:slow") as job:
    job.when(lambda: runs.step(workdir) >= several.EVAL_AT).send(1, signal.SIGTERM)
    ended = job.wait(60)
  assert [end.code for end in ended] == [4, 4], job.text()
  assert "train: resuming at step 5" in ended[0].lines
  said = f"SIGTERM; train is saved at step {several.EVAL_AT} of {several.NUM_STEPS}"
  assert all(said in end.lines[-1] for end in ended)
  assert not [row for row in runs.rows(workdir) if "eval_loss" in row]

  runs.finish(2, workdir, preset)
  runs.check_same(workdir, two[0], 0)
  assert runs.rows(workdir) == runs.rows(two[0])


def test_eight_devices_then_four_and_four_processes_then_two(runs, one):
  """Stopped by a signal to one of four processes, resumed by two, on half of it all."""
  workdir, preset = "fewer", "--config.mesh.preset=fsdp"
  with runs.start(4, workdir, preset) as job:
    job.when(lambda: runs.step(workdir) >= 7).send(3, signal.SIGTERM)
    ended = job.wait(60)
  assert [end.code for end in ended] == [4] * 4, job.text()
  step = runs.step(workdir)
  assert f"train is saved at step {step} of {several.NUM_STEPS}" in ended[0].lines[-1]
  assert runs.position(workdir, step) == {"next_index": step}
  (first, *_) = runs.finish(2, workdir, preset)
  assert f"train: resuming at step {step}" in first.lines
  assert (
    "resuming in another environment: env.num_processes: 4 -> 2" in first.lines
    and "resuming in another environment: env.num_devices: 8 -> 4" in first.lines
  )
  runs.check_same(workdir, one, 1e-6)


def test_processes_that_hold_the_same_rows(runs, one):
  (first, _) = runs.finish(2, "tp", "--config.mesh.preset=tp", devices=1)
  assert "1 different shares of a batch are read by 2 processes" in first.lines[1]
  runs.check_same("tp", one, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("count", "devices", "args"),
  [
    (4, 1, ("dp",)),
    (2, 2, ("hsdp", "--config.mesh.shape.data=2")),
    (4, 2, ("fsdp+tp", "--config.mesh.shape.tensor=4")),
    (2, 1, ("ring",)),
    (2, 2, ("zero2",)),
  ],
)
def test_presets_over_processes(runs, one, count, devices, args):
  preset, *rest = args
  workdir = f"preset-{preset}"
  runs.finish(count, workdir, f"--config.mesh.preset={preset}", *rest, devices=devices)
  runs.check_same(workdir, one, 1e-6)


@pytest.mark.slow
def test_a_run_on_another_mesh_goes_on(runs, one):
  """`mesh` may change from start to start, and nothing else."""
  workdir = "elsewhere"
  with runs.start(2, workdir, "--config.mesh.preset=fsdp") as job:
    job.when(lambda: runs.step(workdir) >= 7).send(0, signal.SIGINT)
    ended = job.wait(60)
  assert [end.code for end in ended] == [4, 4], job.text()
  with runs.start(1, workdir, "--config.seed=1", "--dist=off") as job:
    (refused,) = job.wait(60)
  assert refused.code == 2 and "config.seed: 0 -> 1" in refused.lines[-1]
  assert "mesh" not in refused.lines[-1]
  runs.finish(1, workdir, "--config.mesh.preset=tp", "--dist=off", devices=4)
  runs.check_same(workdir, one, 1e-6)
  config = json.loads((runs.folder / workdir / "config.json").read_text())
  assert config["mesh"]["preset"] == "tp"


_SPLIT = ("--config.mesh.preset=fsdp", "--config.stages[0].options.num_steps=2")


def test_transforms_of_what_is_split_over_processes_are_refused(runs):
  with runs.start(2, "split", *_SPLIT, config="tiny.py:int8", devices=1) as job:
    refused = job.wait(60)
  assert [end.code for end in refused] == [2, 2]
  for end in refused:
    assert "config.stages[1] (int8): 'rtn' needs whole parameters" in end.lines[-1]
    assert "--until=train" in end.lines[-1]
  assert not (runs.folder / "split").exists()


@pytest.mark.slow
def test_transforms_need_whole_parameters(runs):
  """One process goes on where several stop, or all of them do the same."""
  workdir, config = "transforms", "tiny.py:int8"
  several = dict(config=config, devices=1)
  (first, _) = runs.finish(2, workdir, *_SPLIT, "--until=train", **several)
  assert first.out == "" and first.lines[-1].endswith("without --until it goes on")
  assert not (runs.folder / workdir / "stages" / "2-int8").exists()
  (alone,) = runs.finish(1, workdir, *_SPLIT, "--dist=off", **several)
  assert "[1/2] train: done before" in alone.lines

  # Where every process has all of the parameters it works, and gives the same.
  runs.finish(2, "together", "--config.mesh.preset=dp", _SPLIT[1], **several)
  mine, theirs = (
    json.loads((runs.folder / name / "result.json").read_text())["stages"][1]
    for name in ("together", workdir)
  )
  for name in ("bytes_held", "bytes_on_disk", "num_nonzero", "flops_per_token"):
    assert mine[name] == theirs[name], name
  assert mine["quality"]["loss"] == pytest.approx(theirs["quality"]["loss"], rel=1e-4)
  assert mine["decode_ms_p50"] > 0


@pytest.mark.slow
def test_masks_that_are_split_over_processes(runs):
  """Sparse training, then training under its masks.

  Its first program has collectives in parts that do not depend on each other.
  """
  together, alone = "sparse", "sparse-alone"
  shared = dict(config="tiny.py:sparse", devices=1)
  runs.finish(2, together, "--config.mesh.preset=fsdp", **shared)
  runs.finish(1, alone, "--dist=off", **shared)
  assert runs.losses(together) == pytest.approx(runs.losses(alone), rel=1e-4, abs=0)
  found, expected = (
    json.loads((runs.folder / name / "result.json").read_text())["stages"]
    for name in (together, alone)
  )
  for ours, theirs in zip(found, expected, strict=True):
    assert ours["num_nonzero"] == theirs["num_nonzero"] < ours["num_params"]


def test_what_process_0_refuses_all_refuse(runs):
  root = runs.folder / "taken"
  with folder.opened(root, {}, []):
    with runs.start(2, "taken", "--fresh", devices=1) as job:
      ended = job.wait(60)
  assert [end.code for end in ended] == [2, 2]
  said = f"effjax: error: another process is running in {root}; wait for it"
  assert all(end.lines[-1].startswith(said) for end in ended)


@pytest.mark.slow
def test_configs_that_differ_are_refused(runs):
  each = lambda number: [f"--config.seed={number}"]
  with runs.start(2, "other", devices=1, each=each) as job:
    ended = job.wait(60)
  assert [end.code for end in ended] == [2, 2]
  said = "process 1 has another config than process 0: config.seed: 0 -> 1; start all"
  assert all(said in end.lines[-1] for end in ended)
  assert not (runs.folder / "other").exists()


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_found_out(runs):
  each = lambda number: ["--workdir", runs.folder / f"own-{number}"]
  with runs.start(2, "own", "--dist-timeout=20", devices=1, each=each) as job:
    ended = job.wait(120)
  assert [end.code for end in ended] == [2, 2]
  assert all("does not see" in end.lines[-1] for end in ended)
  assert all("must be on a file system that all" in end.lines[-1] for end in ended)


@pytest.mark.slow
def test_an_error_while_process_0_writes_ends_all(runs):
  root = runs.folder / "blocked"
  with runs.start(2, "blocked", devices=1) as job:
    job.when(lambda: (root / "config.json").exists())
    (root / "metrics.jsonl").mkdir()
    ended = job.wait(60)
  assert [end.code for end in ended] == [1, 1]
  assert "IsADirectoryError" in ended[0].lines[-1]
  assert "failed: IsADirectoryError" in ended[1].lines[-1]


def test_the_slurm_script_starts_again_what_can_go_on(slurm):
  done, asked, job = slurm(effjax="stopped")
  assert done.returncode == 4 and asked == f"requeue {job}\n"
  again = dict(effjax="stopped", CODE="137")
  assert slurm(**again, SLURM_RESTART_COUNT="2")[1] == 2 * f"requeue {job}\n"
  for env in ({"SLURM_RESTART_COUNT": "3"}, {"CODE": "2"}, {"CODE": "0"}):
    done, asked, _ = slurm(**again | env)
    assert asked == 2 * f"requeue {job}\n"
    assert done.returncode == int(env.get("CODE", "137"))


@pytest.mark.slow
def test_the_script_for_one_machine(runs, one):
  """local.sh, stopped by Ctrl-C's signal and started again."""
  workdir = runs.folder / "local"
  command = [several.LAUNCH / "local.sh", "2", sys.executable, "-m", "effjax", "run"]
  command += ["--config", "tiny.py", "--workdir", workdir, "--config.mesh.preset=dp"]
  env = os.environ | runs.env | {"JAX_NUM_CPU_DEVICES": "1"}
  start = lambda: subprocess.Popen(
    list(map(str, command)),
    cwd=runs.folder,
    env=env | {"PYTHONPATH": str(processes.ROOT)},
    stderr=subprocess.PIPE,
    text=True,
  )
  running = start()
  while runs.step("local") < 7 and running.poll() is None:
    pass
  running.send_signal(signal.SIGTERM)
  assert running.communicate(timeout=60)[1].count("stopped by SIGTERM") == 2
  assert running.returncode == 4
  running = start()
  running.communicate(timeout=120)
  assert running.returncode == 0
  runs.check_same("local", one, 1e-6)
  assert shutil.which("bash")
  usage = subprocess.run(
    [several.LAUNCH / "local.sh", "two"], capture_output=True, text=True
  )
  assert usage.returncode == 2 and "usage:" in usage.stderr
