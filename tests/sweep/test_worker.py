"""Workers: every point once, whoever dies; and every ending told."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent import futures

import optuna
import pytest

from effjax.core import errors
from effjax.sweep import points, store, worker

ROOT = pathlib.Path(__file__).resolve().parents[2]
_WORKER = """
import json, pathlib, sys
from effjax.sweep import points, worker

config, root, command = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
worker.work(points.make(config), root, heartbeat_secs=1, command=command)
"""


def _start(config, root, command) -> subprocess.Popen:
  """A worker in a process of its own, with a heartbeat a second."""
  arguments = [config, str(root), json.dumps(command)]
  return subprocess.Popen(
    [sys.executable, "-c", _WORKER, *arguments],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )


def _steps(root, number) -> list[str]:
  path = root / "trials" / f"{number:04d}" / "steps.txt"
  return path.read_text().splitlines() if path.exists() else []


def _wait_until(condition, secs: float = 60) -> None:
  end = time.monotonic() + secs
  while not condition():
    assert time.monotonic() < end, "this never came true"
    time.sleep(0.05)


def _states(root) -> list[str]:
  """The states of the trials, as Optuna's own tools see them."""
  url = f"sqlite:///{root / 'sweep.db'}"
  study = optuna.load_study(study_name=root.name, storage=url)
  return [trial.state.name for trial in study.get_trials()]


@pytest.mark.parametrize("run_survives", [False, True])
def test_a_killed_workers_trial_is_taken_over(recipe, fake_run, tmp_path, run_survives):
  config, command, root = recipe(seeds=4), fake_run(steps=15), tmp_path / "sweep"
  doomed = _start(config, root, command)
  _wait_until(lambda: len(_steps(root, 0)) > 3)
  other = _start(config, root, command)
  doomed.kill()
  doomed.communicate()
  if not run_survives:
    os.kill(int(_steps(root, 0)[0].split()[1]), signal.SIGKILL)
  _, said = other.communicate(timeout=120)
  assert other.returncode == 0, said
  for number in range(4):
    lines = _steps(root, number)
    starts = [line for line in lines if line.startswith("start")]
    # Taken over where it stood: no step was done twice, none was left out.
    assert [line for line in lines if line not in starts] == [
      f"step {i}" for i in range(15)
    ]
    assert len(starts) == (2 if number == 0 else 1)
  states = _states(root)
  assert states.count("COMPLETE") == 4
  assert states.count("FAIL") == 1  # The trial of the dead worker.


def test_two_workers_share_the_points(recipe, fake_run, tmp_path):
  config, command, root = recipe(seeds=6), fake_run(steps=5), tmp_path / "sweep"
  workers = [_start(config, root, command) for _ in range(2)]
  said = [process.communicate(timeout=120)[1] for process in workers]
  assert [process.returncode for process in workers] == [0, 0], said
  ran = [line for text in said for line in text.splitlines() if "seed=" in line]
  assert sorted(line.split(": ")[1] for line in ran) == [f"seed={i}" for i in range(6)]
  assert _states(root) == ["COMPLETE"] * 6


def test_a_point_is_claimed_by_one_of_many(tmp_path):
  about, points_ = {"config": "x"}, [{"seed": str(i)} for i in range(12)]
  stores = [store.Store(tmp_path / "sweep") for _ in range(4)]
  for own in stores:
    own.join(about, points_)

  def claim_all(own: store.Store) -> list[int]:
    claimed = iter(own.claim, None)
    return [trial.number for trial in claimed]

  with futures.ThreadPoolExecutor(len(stores)) as pool:
    numbers = [n for found in pool.map(claim_all, stores) for n in found]
  assert sorted(numbers) == list(range(12))


def test_a_stopped_worker_gives_its_trial_back(recipe, fake_run, tmp_path):
  config, command, root = recipe(seeds=1), fake_run(steps=50), tmp_path / "sweep"
  process = _start(config, root, command)
  _wait_until(lambda: len(_steps(root, 0)) > 3)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=60)
  assert process.returncode != 0
  assert "stopped by SIGTERM" in said
  assert _states(root) == ["WAITING"]


def test_what_failed_is_told_and_what_crashed_is_tried_again(
  recipe, fake_run, tmp_path
):
  sweep, root = points.make(recipe(seeds=4)), tmp_path / "sweep"
  broken = fake_run(codes={"1": 1, "2": 3})
  outcome = worker.work(sweep, root, command=broken)
  assert outcome.num_trials == 4
  assert outcome.failed == {1: "something to say", 2: "diverged"}
  outcome = worker.work(sweep, root, command=fake_run())
  assert outcome.failed == {2: "diverged"}
  assert len(_steps(root, 0)) == len(_steps(root, 2)) == 1
  assert len(_steps(root, 1)) == 2


def test_more_points_join_a_finished_sweep(recipe, fake_run, tmp_path):
  root, command = tmp_path / "sweep", fake_run()
  worker.work(points.make(recipe(), seeds="2"), root, command=command)
  worker.work(points.make(recipe(), seeds="0,5"), root, command=command)
  content = json.loads((root / "sweep.json").read_text())
  seeds = [(trial["number"], trial["point"]["seed"]) for trial in content["trials"]]
  assert seeds == [(0, "0"), (1, "1"), (2, "5")]
  assert len(_steps(root, 0)) == len(_steps(root, 2)) == 1


def test_another_sweep_in_the_folder_is_refused(recipe, fake_run, tmp_path):
  root, command = tmp_path / "sweep", fake_run()
  worker.work(points.make(recipe(), seeds="1"), root, command=command)
  other = points.make(recipe(), ["--config.model.embed_dim=32"], seeds="1")
  with pytest.raises(errors.InputError, match="embed_dim=32.*choose another --workdir"):
    worker.work(other, root, command=command)


def test_a_folder_of_something_else_is_refused(recipe, tmp_path):
  (tmp_path / "thesis.tex").touch()
  with pytest.raises(errors.InputError, match=r"holds recipe.py, thesis.tex"):
    worker.work(points.make(recipe(), seeds="1"), tmp_path)


@pytest.mark.parametrize(
  ("url", "message"),
  [
    ("sqlite:////no/such/folder/x.db", "unable to open database file"),
    ("not a url", "Could not parse"),
    ("postgresql://me:secret@127.0.0.1:1/x", r"me:\*\*\*@.* cannot be reached"),
  ],
)
def test_a_store_that_cannot_be_reached_is_named(recipe, tmp_path, url, message):
  root = tmp_path / "sweep"
  with pytest.raises(errors.InputError, match=message):
    worker.work(points.make(recipe(), seeds="1"), root, url)
  assert not root.exists()


def test_a_wrong_point_is_named_before_anything_is_written(recipe, tmp_path):
  sweep = points.make(recipe(), grids=["model.num_layers=1,-1"])
  with pytest.raises(errors.InputError, match="at model.num_layers=-1"):
    worker.work(sweep, tmp_path / "sweep")
  assert not (tmp_path / "sweep").exists()
