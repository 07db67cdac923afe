"""A tiny recipe, run in several processes, and a stand-in for Slurm."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests import processes

LAUNCH = processes.ROOT / "experiments" / "launch"
NUM_STEPS, EVAL_AT = 20, 10
_CONFIG = '''"""Trains; then int8, or evaluates slowly, if asked to."""
import time

import ml_collections

from effjax.data import evaluation


def slow_down():
  batches = evaluation.EvalSet.batches

  def slowly(self, *args):
    for batch in batches(self, *args):
      time.sleep(0.2)
      yield batch

  evaluation.EvalSet.batches = slowly


def get_config(arg=""):
  if arg == "slow":
    slow_down()
  c = ml_collections.ConfigDict()
  c.data = {
    "corpus": "text_files",
    "options": {"paths": (TEXTS,)},
    "tokenizer": "bytes",
    "vocab_size": 257,
    "sequence_length": 32,
    "batch_size": 8,
    "eval_bytes": 2000,
  }
  c.model = {
    "vocab_size": 257,
    "embed_dim": 16,
    "num_layers": 1,
    "mixer_options": {
      "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 4},
    },
    "max_len": 64,
  }
  c.measure = {
    "eval_batch_size": 4,
    "prompt_tokens": 8,
    "decode_tokens": 2,
    "warmup_tokens": 1,
    "prefill_repeats": 1,
    "latency": arg == "int8",
    "xz_preset": 0,
  }
  training = {
    "num_steps": NUM_STEPS,
    "log_every": 1,
    "eval_every": EVAL_AT,
    "checkpoint_every": 5,
    "optimizer": {"name": "adamw", "learning_rate": 3e-3},
  }
  c.stages = ({"name": "train", "technique": "train", "options": training},)
  if arg == "int8":
    c.stages += ({"name": "int8", "technique": "rtn"},)
  return c
'''


class Runs:
  """Starts recipes in processes, and reads what they wrote."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.env = {"EFFJAX_CACHE": str(folder / "cache"), "EFFJAX_HEARTBEAT_SECS": "8"}

  def start(self, count, workdir, *args, devices=2, config="tiny.py", each=None, **env):
    """A job of `effjax run` in some processes with some devices each."""
    command = [sys.executable, "-m", "effjax", "run", "--config", self.folder / config]
    return processes.running(
      self.folder,
      count,
      [*command, "--workdir", self.folder / workdir, *args],
      self.env | {"JAX_NUM_CPU_DEVICES": str(devices)} | env,
      **({} if each is None else {"each": each}),
    )

  def finish(self, count, workdir, *args, **kwargs):
    """Runs it to its end, which must be a good one."""
    with self.start(count, workdir, *args, **kwargs) as job:
      ended = job.wait()
    assert [end.code for end in ended] == [0] * count, job.text()
    return ended

  def rows(self, workdir):
    """The whole rows of metrics.jsonl, without what may differ."""
    path = self.folder / workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    timed = ("tokens_per_sec", "mfu", "memory_bytes", "wall_secs", "eval_secs")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]

  def step(self, workdir):
    """The last step that was logged."""
    return max((row["step"] for row in self.rows(workdir)), default=0)

  def losses(self, workdir):
    """Losses of all steps, and of all evaluations."""
    return {
      (row["step"], name): row[name]
      for row in self.rows(workdir)
      for name in ("loss", "grad_norm", "eval_loss")
      if name in row
    }

  def position(self, workdir, step):
    """Where in the data a checkpoint goes on."""
    folder = self.folder / workdir / "checkpoints" / "train" / str(step)
    return json.loads((folder / "meta" / "metadata").read_text())["position"]

  def check_same(self, workdir, other, tolerance):
    """Compares all losses of two runs, and what the table says."""
    found, expected = self.losses(workdir), self.losses(other)
    steps = {step for step, name in found if name == "loss"}
    assert steps == set(range(1, NUM_STEPS + 1))
    assert found == pytest.approx(expected, rel=tolerance, abs=0)
    ours, theirs = (
      json.loads((self.folder / name / "result.json").read_text())["stages"][0]
      for name in (workdir, other)
    )
    quality = theirs["quality"] if tolerance else ours["quality"]
    assert ours["quality"]["loss"] == pytest.approx(quality["loss"], rel=1e-6)
    for name in ("num_params", "num_nonzero", "bytes_held", "bytes_on_disk"):
      assert ours[name] == theirs[name], name


def make(folder: pathlib.Path) -> Runs:
  """Writes the recipe and its text."""
  text = "".join(f"the {n}th line says {n * n} and no more\n" for n in range(2000))
  for part in range(4):
    (folder / f"{part}.txt").write_text(text[part::4] + text)
  config = _CONFIG
  for name, value in (
    ("TEXTS", repr(str(folder / "*.txt"))),
    ("NUM_STEPS", str(NUM_STEPS)),
    ("EVAL_AT", str(EVAL_AT)),
  ):
    config = config.replace(name, value)
  (folder / "tiny.py").write_text(config)
  return Runs(folder)


_SRUN = '''#!{python}
"""What srun does, on one machine: a task a node, with the variables of a real one."""
import os, signal, subprocess, sys

words = sys.argv[1:]
while words and words[0].startswith("-"):
  words.pop(0)
count = int(os.environ["SLURM_NTASKS"])
tasks = []
for i in range(count):
  own = {{
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": str(i),
    "SLURM_PROCID": str(i),
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost,localhost",
    "SLURM_STEP_NUM_NODES": str(count),
    "SLURM_STEP_NUM_TASKS": str(count),
    "SLURM_STEP_TASKS_PER_NODE": f"1(x{{count}})",
  }}
  with open(f"task-{{i}}.stderr", "w") as log:
    tasks.append(subprocess.Popen(words, env=os.environ | own, stderr=log))
for name in (signal.SIGTERM, signal.SIGINT):
  signal.signal(name, lambda name, _: [task.send_signal(name) for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
'''


def slurm(runs: Runs) -> Callable[..., tuple[subprocess.CompletedProcess, str, int]]:
  """Runs slurm.sbatch as sbatch would, with stand-ins for srun and scontrol.

  Returns:
    A function that returns how the script ended, what scontrol was asked, and the
    number of the job.
  """
  commands = runs.folder / "bin"
  commands.mkdir()
  for name, text in (
    ("srun", _SRUN.format(python=sys.executable)),
    ("scontrol", f'#!/bin/sh\necho "$@" >> {runs.folder}/scontrol\n'),
    ("effjax", f'#!/bin/sh\nexec {sys.executable} -m effjax "$@"\n'),
    ("stopped", "#!/bin/sh\nexit ${CODE:-4}\n"),
  ):
    (commands / name).write_text(text)
    (commands / name).chmod(0o755)
  # JAX's port of the coordinator follows from the number of the job.
  first = 2**16 - 2**12
  job = processes.free_port(range(first, 2**16)) - first

  def run(*args, effjax="effjax", **env):
    variables = {
      "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
      "PYTHONPATH": str(processes.ROOT),
      "JAX_NUM_CPU_DEVICES": "2",
      "EFFJAX": str(commands / effjax),
      "SLURM_JOB_ID": str(job),
      "SLURM_NTASKS": "2",
      # The script itself is a batch step of one task.
      "SLURM_PROCID": "0",
      "SLURM_LOCALID": "0",
    }
    done = subprocess.run(
      ["bash", LAUNCH / "slurm.sbatch", *map(str, args)],
      cwd=runs.folder,
      env=os.environ | runs.env | variables | env,
      capture_output=True,
      text=True,
      timeout=240,
    )
    asked = runs.folder / "scontrol"
    return done, asked.read_text() if asked.exists() else "", job

  return run
