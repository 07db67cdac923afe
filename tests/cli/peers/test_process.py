"""Processes of lanes seen from outside: answers, and how failures are told."""

import stat
import sys

import pytest

from effjax.cli.peers import lane, process
from effjax.core import errors

OPTIONS = lane.Options(model="m", format="f", tokens="t", prompt=1, threads=3)


@pytest.fixture
def started(tmp_path, monkeypatch):
  """Starts a lane that is this shell script."""

  def start(script):
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))
    return process.Process("a system f", "a_lane", OPTIONS, tmp_path / "log")

  return start


def test_commands_are_answered(started):
  # The script is given: -m, the module, the options.
  script = """echo "{\\"module\\": \\"$2\\", \\"threads\\": $OMP_NUM_THREADS}"
  read command; echo "$command"\n"""
  with started(script) as running:
    assert running.answer() == {"module": "effjax.cli.peers.a_lane", "threads": 3}
    assert running.ask("turn", logits="x") == {"do": "turn", "logits": "x"}


def test_a_failure_is_its_last_line(started):
  with started("echo Traceback >&2; echo 'Error: no model' >&2; exit 1\n") as running:
    with pytest.raises(errors.EffjaxError) as caught:
      running.answer()
    assert str(caught.value) == "a system f failed: Error: no model"
    with pytest.raises(errors.EffjaxError, match="no model"):
      running.ask("turn")


def test_a_signal_is_named(started):
  with started("echo loading >&2; kill -KILL $$\n") as running:
    with pytest.raises(errors.EffjaxError, match="ended by SIGKILL.*: loading"):
      running.answer()


def test_a_silent_failure_says_so(started):
  with started("exit 3\n") as running:
    with pytest.raises(errors.EffjaxError, match="it said nothing"):
      running.answer()


def test_leaving_ends_the_process(started):
  with started("echo '{}'; exec sleep 1000\n") as running:
    running.answer()
  with pytest.raises(ValueError, match="closed file"):
    running.ask("turn")
