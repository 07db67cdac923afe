import json
import subprocess
import sys

import pytest

from effjax.cli import catalog, main
from effjax.core import registry


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["rnu"], "did you mean 'run'?"),
    (["--jsn"], "unknown flag"),
    (["list", "mixerz"], "did you mean 'mixers'?"),
    (["list", "--jsno"], "did you mean '--json'?"),
    (["list", "mixers", "stray"], "stray argument 'stray'"),
    (["list", "--config.seed=1"], "unknown flag"),
    (["run"], "--config"),
    (["run", "--config", "configs/quickstrat.py"], "configs/quickstart.py"),
    (["generate", "--prompt", "x"], "--workdir"),
    (["bench", "dekode"], "did you mean 'decode'?"),
  ],
)
def test_bad_usage_is_one_line_and_exit_2(argv, message, capsys):
  assert main.main(argv) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert message in err
  assert err.count("\n") == 1


@pytest.mark.parametrize("verb", registry.names(catalog.VERBS))
def test_help_of_every_verb(verb, capsys):
  assert main.main([verb, "--help"]) == 0
  out, err = capsys.readouterr()
  assert err == ""
  assert "Examples:" in out
  assert f"effjax {verb}" in out


def test_overview_names_every_verb(capsys):
  assert main.main(["--help"]) == 0
  out = capsys.readouterr().out
  for verb in registry.names(catalog.VERBS):
    assert f"  {verb} " in out
  assert main.main([]) == 2


def test_list_json_holds_every_topic(capsys):
  assert main.main(["list", "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found.keys() == set(catalog.topics())
  assert {"attention", "mamba2"} <= found["mixers"].keys()
  assert {"rtn", "magnitude"} <= found["transforms"].keys()
  assert all(summary for topic in found.values() for summary in topic.values())


def test_help_and_list_import_neither_jax_nor_numpy():
  code = (
    "import sys; from effjax.cli import main; main.main(['list']); "
    "main.main(['--help']); heavy = {'jax', 'numpy', 'flax'} & set(sys.modules); "
    "assert not heavy, heavy"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
