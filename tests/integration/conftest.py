"""One tiny run, made once by the command line, that all integration tests look at."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Fields that say when, how fast or in how much memory; all others must be equal bit for
# bit between a run that was stopped and one that never was.
TIMED = {
  "prefill_ms",
  "decode_ms_p50",
  "decode_ms_p90",
  "tokens_per_sec",
  "peak_memory_bytes",
  "stage_secs",
  "mfu",
  "memory_bytes",
  "wall_secs",
  "eval_secs",
}

_CONFIG = '''"""Trains, compresses, fine-tunes in seconds.

"hybrid" adds Mamba-2, and "sparse" prunes by sparse training.
"""
import ml_collections


def get_config(arg=""):
  training = {
    "checkpoint_every": 3,
    "log_every": 1,
    "eval_every": 6,
    "optimizer": {"name": "adamw", "learning_rate": 3e-3},
  }
  c = ml_collections.ConfigDict()
  c.data = {
    "corpus": "text_files",
    "options": {"paths": (TEXTS,)},
    "tokenizer": "bytes",
    "vocab_size": 257,
    "sequence_length": 64,
    "batch_size": 8,
    "eval_bytes": 3000,
  }
  c.model = {
    "vocab_size": 257,
    "embed_dim": 32,
    "num_layers": 2 if arg == "hybrid" else 1,
    "pattern": ("mamba2", "attention") if arg == "hybrid" else ("attention",),
    "mixer_options": {
      "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
      "mamba2": {"head_dim": 16, "state_dim": 16, "chunk": 32},
    },
    "max_len": 96,
  }
  c.measure = {
    "prompt_tokens": 16,
    "decode_tokens": 4,
    "warmup_tokens": 2,
    "prefill_repeats": 1,
    "xz_preset": 0,
  }
  pruned = {"technique": "magnitude"}
  if arg == "sparse":
    sparsity = {"name": "rigl", "sparsity": 0.5, "options": {"every": 2}}
    options = {"num_steps": 9, "sparsity": sparsity, **training}
    pruned = {"technique": "train", "options": options}
  c.stages = (
    {"name": "train", "technique": "train", "options": {"num_steps": 12, **training}},
    {"name": "int8", "technique": "rtn", "options": {"activations": "int8"}},
    {"name": "pruned", "after": "train", **pruned},
    {"name": "tuned", "technique": "train", "options": {"num_steps": 7, **training}},
    {"name": "int4", "technique": "rtn", "options": {"bits": 4, "group": 16}},
  )
  return c
'''


class Command:
  """Runs `effjax` in processes of their own, with the caches of this session."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.config = folder / "tiny.py"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    self.env = os.environ | {
      "PYTHONPATH": path,
      "EFFJAX_CACHE": str(folder / "cache"),
      "JAX_PLATFORMS": "cpu",
    }

  @staticmethod
  def untimed(value: Any) -> Any:
    """A JSON value without the fields that may differ between equal runs."""
    if isinstance(value, dict):
      return {k: Command.untimed(v) for k, v in value.items() if k not in TIMED}
    return [Command.untimed(v) for v in value] if isinstance(value, list) else value

  @staticmethod
  def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl, without what may differ."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [Command.untimed(json.loads(line)) for line in lines if line.endswith("\n")]

  @staticmethod
  def result(workdir: pathlib.Path) -> Any:
    """result.json, without what may differ."""
    return Command.untimed(json.loads((workdir / "result.json").read_text()))

  def __call__(self, *args: Any, **env: str) -> subprocess.CompletedProcess:
    """Runs a verb to its end; keyword arguments are environment variables."""
    return subprocess.run(
      [sys.executable, "-m", "effjax", *map(str, args)],
      cwd=self.folder,
      env=self.env | env,
      capture_output=True,
      text=True,
      timeout=300,
    )

  def run(
    self, workdir: pathlib.Path, *args: Any, **env: str
  ) -> subprocess.CompletedProcess:
    """Runs the recipe in `workdir`."""
    return self("run", "--config", self.config, "--workdir", workdir, *args, **env)

  def signal_when(
    self,
    workdir: pathlib.Path,
    reached: Callable[[pathlib.Path], bool],
    number: signal.Signals,
  ) -> tuple[int, str, float]:
    """Starts the recipe, sends a signal once `reached(workdir)`.

    Returns:
      Exit code (also if it ended before), stderr, seconds from the signal to the end.
    """
    log = workdir.with_suffix(".stderr")
    with open(log, "w") as stderr:
      process = subprocess.Popen(
        [sys.executable, "-m", "effjax", "run", "--config", self.config]
        + ["--workdir", workdir],
        cwd=self.folder,
        env=self.env,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
      )
      try:
        deadline = time.monotonic() + 240
        while not reached(workdir):
          if process.poll() is not None:
            return process.returncode, log.read_text(), 0.0
          assert time.monotonic() < deadline, f"never got there: {log.read_text()}"
          time.sleep(0.005)
        sent = time.monotonic()
        process.send_signal(number)
        code = process.wait(timeout=120)
        return code, log.read_text(), time.monotonic() - sent
      finally:
        process.kill()
        process.wait()


def _texts(folder: pathlib.Path) -> None:
  """Some files of the standard library, as a user's own text."""
  folder.mkdir()
  stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
  for path in sorted(stdlib.glob("*.py"), key=lambda p: p.stat().st_size)[40:70]:
    (folder / path.name).write_bytes(path.read_bytes())


@pytest.fixture(scope="session")
def command(tmp_path_factory) -> Command:
  folder = tmp_path_factory.mktemp("integration")
  _texts(folder / "texts")
  text = _CONFIG.replace("TEXTS", repr(str(folder / "texts")))
  (folder / "tiny.py").write_text(text)
  return Command(folder)


@pytest.fixture(scope="session")
def finished(command) -> pathlib.Path:
  """The folder of a run that was never stopped, and was profiled all the while."""
  workdir = command.folder / "finished"
  done = command.run(workdir, "--profile")
  assert done.returncode == 0, done.stderr
  return workdir
