"""`effjax sweep` and `effjax report` of what it made, with real runs."""

import json

import pytest

from effjax.cli import main
from effjax.report import compare


@pytest.fixture
def sweep(recipe, tmp_workdir, monkeypatch):
  """The start of a command line: two widths with one seed, in an empty folder."""
  monkeypatch.setenv("EFFJAX_CACHE", str(tmp_workdir / "cache"))
  path = recipe(grid={"arg": ("narrow", "wide")}, seeds=1)
  return ["sweep", "--config", path, "--workdir", "widths"]


def test_a_sweep_runs_and_reports(sweep, tmp_workdir, capsys):
  assert main.main([*sweep, "--json"]) == 0
  out, err = capsys.readouterr()
  groups = json.loads(out)
  assert [group["fields"] for group in groups] == [{"arg": "narrow"}, {"arg": "wide"}]
  sizes = [group["stages"][0]["num_params"] for group in groups]
  assert sizes[1] > 1.9 * sizes[0]
  assert "trials/0001: arg=wide, seed=0" in err
  # Every trial is an ordinary run folder.
  for number in ("0000", "0001"):
    assert main.main(["report", f"widths/trials/{number}"]) == 0
  capsys.readouterr()
  assert (tmp_workdir / "widths" / "report.html").exists()
  # More seeds join, and are averaged over.
  assert main.main([*sweep, "--grid", "arg=wide", "--seeds", "2"]) == 0
  table = capsys.readouterr().out.splitlines()
  assert [line.split()[:2] for line in table] == [
    ["arg", "runs"],
    ["narrow", "1"],
    ["wide", "2"],
  ]
  runs = [f"widths/trials/{number}" for number in ("0000", "0001", "0002")]
  assert main.main(["report", *runs, "--by", "seed", "--out", "by"]) == 0
  table = capsys.readouterr().out.splitlines()
  assert [line.split()[:2] for line in table] == [
    ["seed", "runs"],
    ["0", "2"],
    ["1", "1"],
  ]
  whole = compare.read(["widths"])
  losses = [run.stages[0]["quality"]["loss"] for run in whole[1].runs]
  assert whole[1].stages[0]["quality"]["loss"] == sum(losses) / 2
  assert losses[0] != losses[1]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--grid", "model.embed_dimm=8,16"], "did you mean 'embed_dim'"),
    (["--store", "sqlite:////no/such/x.db"], "the store sqlite:////no/such/x.db"),
    (["--trials", "3"], "--range and --trials need --search"),
    (["--search", "tpe", "--seeds", "3"], "--search takes --range and --grid"),
    (["--workdir", "."], "is not the folder of a sweep"),
  ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
  sweep, tmp_workdir, capsys, arguments, message
):
  before = sorted(tmp_workdir.iterdir())
  assert main.main([*sweep, *arguments]) == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.count("\n") == 1
  assert sorted(tmp_workdir.iterdir()) == before


def test_a_report_of_a_field_that_is_not_there_is_refused(sweep, capsys):
  assert main.main(["report", "nowhere", "--by", "seed"]) == 2
  assert "nowhere is not a folder" in capsys.readouterr().err
