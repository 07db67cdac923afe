"""A lane's process: what it answers, in which order, and what it keeps to itself."""

import json
import subprocess
import sys

import numpy as np
import pytest

PROMPT, STEPS, ROWS, VOCAB = 4, 3, 2, 5
PROGRAM = f"""
import numpy as np
from effjax.cli.peers import lane

class Counter:
  about = "counts tokens"

  def __init__(self, options, rows, length):
    print("printed while loading", options.format)
    assert (rows, length) == ({ROWS}, {PROMPT + STEPS})

  def prefill(self, tokens_BL):
    self.seen_B = tokens_BL.sum(1)

  def step(self, token_B):
    print("printed while decoding")
    self.seen_B = self.seen_B + token_B

  def logits(self):
    return np.repeat(self.seen_B[:, None], {VOCAB}, axis=1)

lane.serve(Counter)
"""


@pytest.fixture
def served(tmp_path, subprocess_env):
  """Runs a lane on random tokens and commands: tokens, its answers, its stderr."""

  def run(*commands):
    tokens_BL = np.random.default_rng(0).integers(0, 9, (ROWS, PROMPT + STEPS))
    np.save(tmp_path / "tokens.npy", tokens_BL)
    options = {
      "model": "none",
      "format": "float7",
      "tokens": str(tmp_path / "tokens.npy"),
      "prompt": PROMPT,
      "threads": 1,
    }
    done = subprocess.run(
      [sys.executable, "-c", PROGRAM, json.dumps(options)],
      input="".join(json.dumps(command) + "\n" for command in commands),
      capture_output=True,
      check=True,
      env=subprocess_env,
      text=True,
    )
    return tokens_BL, list(map(json.loads, done.stdout.splitlines())), done.stderr

  return run


def test_a_turn_begins_anew_and_tells_its_logits(served, tmp_path):
  path = str(tmp_path / "logits.npy")
  tokens_BL, answers, _ = served({"do": "turn"}, {"do": "turn", "logits": path})
  assert len(answers) == 3
  sums = [tokens_BL[:, :PROMPT].sum(1), tokens_BL.sum(1)]
  logits = np.load(path)
  assert logits.dtype == np.float32
  np.testing.assert_array_equal(
    logits, np.broadcast_to(np.stack(sums)[..., None], (2, ROWS, VOCAB))
  )


def test_answers_hold_times_and_memory(served):
  _, (loaded, turn, closed), _ = served({"do": "turn"}, {"do": "close"})
  assert loaded["about"] == "counts tokens"
  assert turn["prefill_secs"] > 0
  assert len(turn["step_secs"]) == STEPS and min(turn["step_secs"]) > 0
  held, peaks = loaded["libraries_bytes"], (turn["prefill_peak"], turn["decode_peak"])
  assert 0 < held <= closed["peak_bytes"]
  assert all(0 < peak <= closed["peak_bytes"] for peak in peaks)


def test_what_is_printed_is_no_answer(served):
  _, answers, stderr = served({"do": "turn"})
  assert len(answers) == 2
  assert "printed while loading float7" in stderr
  assert stderr.count("printed while decoding") == STEPS


def test_a_lane_ends_with_its_input(served):
  assert len(served()[1]) == 1
