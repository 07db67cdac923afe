"""A recipe whose runs cost nothing, and a stand-in for `effjax run`."""

import json
import pathlib
import sys

import pytest

_RECIPE = '''"""A recipe to sweep."""
import ml_collections


def get_config(arg=""):
  c = ml_collections.ConfigDict()
  c.data = {
    "corpus": "mqar", "tokenizer": "ids", "vocab_size": 64, "sequence_length": 16,
    "options": {"num_pairs": 2, "length": 16, "vocab_size": 64}, "batch_size": 4,
  }
  c.model = {
    "vocab_size": 64, "embed_dim": 32 if arg == "wide" else 16, "num_layers": 1,
    "mlp": "none", "max_len": 16,
    "mixer_options": {"attention": {"num_heads": 2, "head_dim": 8}},
  }
  c.measure = {"latency": False}
  c.stages = ({"name": "train", "technique": "train", "options": {"num_steps": 2}},)
  return c


def get_sweep():
  return SWEEP
'''

# Takes the folder's lock as a run does, and counts to `STEPS`, where it stopped before.
_FAKE_RUN = """
import fcntl, json, os, pathlib, sys, time

folder = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
folder.mkdir(parents=True, exist_ok=True)
lock = open(folder / ".lock", "w")
try:
  fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
  sys.exit("effjax: error: another process is running")
steps = folder / "steps.txt"
with steps.open("a") as file:
  file.write(f"start {os.getpid()}\\n")
if (folder / "result.json").exists():
  sys.exit(0)
done = steps.read_text().count("step")
for number in range(done, STEPS):
  time.sleep(0.1)
  with steps.open("a") as file:
    file.write(f"step {number}\\n")
change = next((a for a in sys.argv if a.startswith("--config.seed=")), "=0")
code = CODES.get(change.split("=")[1], 0)
if code:
  print("effjax: error: something to say")
  sys.exit(code)
row = {"quality": {"loss": 1.5}}
(folder / "result.json").write_text(json.dumps({"stages": [row]}))
"""


@pytest.fixture
def recipe(tmp_path):
  """Writes the recipe with a `get_sweep()`; returns its path as text."""

  def write(**sweep) -> str:
    path = tmp_path / "recipe.py"
    path.write_text(_RECIPE.replace("SWEEP", repr(sweep)))
    return str(path)

  return write


@pytest.fixture
def fake_run(tmp_path):
  """Writes the stand-in; returns the command."""

  def write(steps: int = 0, codes: dict[str, int] | None = None) -> list[str]:
    text = _FAKE_RUN.replace("STEPS", str(steps)).replace(
      "CODES", json.dumps(codes or {})
    )
    path = pathlib.Path(tmp_path / "fake_run.py")
    path.write_text(text)
    return [sys.executable, str(path)]

  return write
