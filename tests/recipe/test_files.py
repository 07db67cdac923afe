import pathlib

import pytest

from effjax.core import errors
from effjax.recipe import files

_GOOD = '''"""A recipe."""
import ml_collections

def get_config(arg=""):
  c = ml_collections.ConfigDict()
  c.word = arg
  c.inner = ml_collections.ConfigDict({"x": 1})
  c.stages = ({"name": "a", "options": {"b": 4}}, ml_collections.ConfigDict({"n": 2}))
  return c
'''


def _write(folder: pathlib.Path, text: str, name: str = "recipe.py") -> str:
  path = folder / name
  path.write_text(text)
  return str(path)


def test_reads_plain_values_and_passes_the_argument(tmp_path):
  path = _write(tmp_path, _GOOD)
  plain = {
    "inner": {"x": 1},
    "stages": ({"name": "a", "options": {"b": 4}}, {"n": 2}),
  }
  assert files.read(path) == plain | {"word": ""}
  assert files.read(f"{path}:smoke") == plain | {"word": "smoke"}
  assert type(files.read(path)["stages"][1]) is dict
  assert [p.name for p in tmp_path.iterdir()] == ["recipe.py"], "something was written"


def test_default_workdir(tmp_path):
  path = _write(tmp_path, _GOOD)
  assert files.default_workdir(path) == pathlib.Path("runs/recipe")
  assert files.default_workdir(f"{path}:smoke") == pathlib.Path("runs/recipe-smoke")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:", "not a Python file"),
    ("x = 1", "defines no get_config"),
    ("def get_config(arg=''):\n  return {}", "must return"),
  ],
)
def test_bad_files(tmp_path, text, message):
  path = _write(tmp_path, text)
  with pytest.raises(errors.InputError) as caught:
    files.read(path)
  assert message in str(caught.value)


def test_missing_file_names_the_nearest(tmp_path):
  _write(tmp_path, _GOOD)
  with pytest.raises(errors.InputError) as caught:
    files.read(str(tmp_path / "recpie.py") + ":smoke")
  assert "does not exist" in str(caught.value)
  assert "recipe.py" in str(caught.value)


def test_an_argument_the_file_does_not_take(tmp_path):
  text = _GOOD.replace('arg=""', "").replace("= arg", "= ''")
  with pytest.raises(errors.InputError, match="takes no argument"):
    files.read(_write(tmp_path, text) + ":smoke")
