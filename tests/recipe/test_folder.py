import json
import subprocess
import sys

import pytest

from effjax.core import errors
from effjax.recipe import folder

_CONFIG = {"seed": 0, "stages": [{"name": "train"}]}


def _names(root):
  return {p.name for p in root.iterdir() if not p.name.startswith(".")}


def test_first_run_writes_config_and_overrides(tmp_path):
  root = tmp_path / "deep" / "run"
  with folder.opened(root, _CONFIG, ["--config.seed=0"]):
    assert json.loads((root / "config.json").read_text()) == _CONFIG
    assert (root / "overrides.txt").read_text() == "--config.seed=0\n"


def test_same_config_resumes_and_keeps_what_is_there(tmp_path):
  with folder.opened(tmp_path, _CONFIG, []):
    (tmp_path / "metrics.jsonl").write_text("kept")
  with folder.opened(tmp_path, _CONFIG, []):
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"


def test_another_config_is_refused_with_what_differs(tmp_path):
  with folder.opened(tmp_path, _CONFIG, []):
    pass
  with pytest.raises(errors.InputError) as caught:
    folder.check(tmp_path, _CONFIG | {"seed": 1}, fresh=False)
  assert "config.seed: 0 -> 1" in str(caught.value)


def test_fresh_deletes_the_run_and_nothing_else(tmp_path):
  with folder.opened(tmp_path, _CONFIG, []):
    (tmp_path / "stages" / "1-train").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
  with folder.opened(tmp_path, _CONFIG | {"seed": 1}, [], fresh=True):
    assert _names(tmp_path) == {"config.json", "overrides.txt", "notes.txt"}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path, fresh):
  (tmp_path / "stages").mkdir()
  (tmp_path / "thesis.tex").write_text("mine")
  with pytest.raises(errors.InputError, match="not a run folder"):
    with folder.opened(tmp_path, _CONFIG, [], fresh=fresh):
      pass
  assert _names(tmp_path) == {"stages", "thesis.tex"}


def test_two_processes_cannot_share_a_folder(tmp_path):
  code = (
    "import sys, pathlib; from effjax.recipe import folder\n"
    "with folder.opened(pathlib.Path(sys.argv[1]), {'seed': 0}, []): pass"
  )
  with folder.opened(tmp_path, {"seed": 0}, []):
    done = subprocess.run(
      [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
  assert "another process is running" in done.stderr


def test_files_are_complete_or_absent(tmp_path):
  with pytest.raises(ValueError, match="Out of range"):
    folder.write_json(tmp_path / "a.json", {"x": float("nan")})
  assert not (tmp_path / "a.json").exists()
  folder.write_json(tmp_path / "a.json", {"x": 1})
  assert folder.read_json(tmp_path / "a.json") == {"x": 1}
  (tmp_path / "a.json").write_text('{"x": ')
  with pytest.raises(errors.InputError, match="damaged"):
    folder.read_json(tmp_path / "a.json")
