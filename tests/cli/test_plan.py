"""`effjax plan`: what it prints, writes and refuses."""

import json
import stat

import pytest

from effjax.cli import main
from tests.recipe import tiny

pytest.importorskip("libtpu")

TRAIN = {
  "name": "train",
  "technique": "train",
  "options": {"num_steps": 3, "precision": {"compute": "bfloat16"}},
}


@pytest.fixture
def config(tmp_path, monkeypatch):
  monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path / "cache"))
  return tiny.write(tmp_path, (TRAIN,))


def _run(capsys, *argv):
  code = main.main([*map(str, argv)])
  said = capsys.readouterr()
  return code, said.out, said.err


def test_a_plan_is_printed_written_and_kept(config, tmp_path, capsys):
  page = tmp_path / "plan.html"
  argv = ("plan", "--config", config, "--topology", "v5e:2x2")
  code, out, err = _run(capsys, *argv, "--html", page)
  assert code == 0 and "compiling it for v5e:2x2" in err
  lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line)
  assert lines["train"] == "on v5e:2x2, 1 chips"
  assert lines["fits"].startswith("yes: 0.0") and " % (" in lines["MFU"]
  assert "model FLOPs / (step_secs x chips x peak" in out
  html = page.read_text("utf-8")
  assert lines["step"] in html and "$" not in html

  code, out, _ = _run(capsys, *argv, "--json")
  made = json.loads(out)
  assert code == 0 and made["fits"] is True and made["num_chips"] == 1
  assert {"hbm_bytes", "step_secs", "mfu", "collective_bytes"} <= set(made)
  assert len(list((tmp_path / "cache" / "pods").iterdir())) == 1


def test_a_search_ranks_compiles_and_says_what_to_override(config, capsys):
  argv = ("plan", "--config", config, "--topology", "v5e:2x2", "--search")
  free = ("--config.mesh.num_devices=None", "--config.data.batch_size=8")
  code, out, err = _run(capsys, *argv, *free, "--compile", "1")
  assert code == 0 and "layouts fit" in err
  assert "in closed form: the best of" in out and "the best of them, compiled" in out
  best = out.split("the best layout:\n")[1].strip()
  assert best.startswith("--config.") or best == "as the config says"

  code, out, _ = _run(capsys, *argv, *free, "--compile", "0", "--json")
  found = json.loads(out)
  assert code == 0 and found["compiled"] == [] and found["num_fitting"] > 10
  secs = [one["step_secs"] for one in found["ranked"]]
  assert secs == sorted(secs)
  assert found["overrides"] == found["ranked"][0]["overrides"]


def test_batches_grow_with_slices(config, tmp_path, capsys):
  plot = tmp_path / "scaling.png"
  argv = ("plan", "--config", config, "--config.mesh.num_devices=None")
  argv += ("--config.data.batch_size=8", "--topology", "v5e:2x2")
  code, out, _ = _run(capsys, *argv, "--scale", "v5e:2x4", "--plot", plot, "--json")
  rows = json.loads(out)
  assert code == 0 and plot.read_bytes().startswith(b"\x89PNG")
  assert {row["chips"] for row in rows} == {4, 8}
  of = {(row["chips"], row["preset"]): row for row in rows}
  # Each chip computes the same, whatever the slice, if it is split by rows alone.
  small, large = of[4, "dp"], of[8, "dp"]
  assert large["chip_secs"] == pytest.approx(small["chip_secs"])
  assert large["hbm_gb"] == pytest.approx(small["hbm_gb"])
  assert of[8, "fsdp"]["hbm_gb"] < of[4, "fsdp"]["hbm_gb"]
  code, _, err = _run(capsys, *argv[:4], "--topology", "v5e:2x4", "--scale", "v5e:4x4")
  assert code == 2 and "a batch of 2 sequences does not divide among the 8" in err


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (("--topology", "v5x:2x2"), "unknown TPU generation 'v5x'"),
    (("--topology", "v5e:2"), "v5e has chips along 2 axes, such as v5e:16x16"),
    (("--topology", "v5e:2x2", "--decode", "8"), "give it like 8x2048"),
    (
      ("--topology", "v5e:2x2", "--search", "--decode", "8x8"),
      "--search and --decode exclude",
    ),
    (("--topology", "v5e:2x2", "--search", "--compile", "-1"), "must not be negative"),
    (
      ("--topology", "v5e:2x2", "--plot", "a.png"),
      "--plot draws the curves of --scale",
    ),
    (("--topology", "v5e:2x2", "--scale", "v5f:2x4"), "unknown TPU generation 'v5f'"),
    (("--topology", "v5e:2x2", "--stage", "tran"), "unknown training stage 'tran'"),
    (("--topology", "v5e:2x2", "--html", "no/such/a.html"), "folder does not exist"),
    (
      ("--topology", "v5e:2x2", "--config.mesh.num_devices=8"),
      "8 are asked for and 4 are present; use at most 4",
    ),
  ],
)
def test_what_cannot_be_planned_is_one_line(config, capsys, argv, message):
  code, out, err = _run(capsys, "plan", "--config", config, *argv)
  assert code == 2 and out == ""
  assert message in err.splitlines()[-1]


def test_a_compiler_that_dies_takes_nothing_along(
  config, tmp_path, capsys, monkeypatch
):
  dying = tmp_path / "python"
  dying.write_text(
    "#!/bin/sh\ncat > /dev/null\necho 'F0000 check failed' >&2\nexit 134\n"
  )
  dying.chmod(dying.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setattr("sys.executable", str(dying))
  code, out, err = _run(capsys, "plan", "--config", config, "--topology", "v5e:2x2")
  assert code == 1 and out == ""
  assert "ended with code 134: F0000 check failed" in err.splitlines()[-1]
