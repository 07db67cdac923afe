import importlib.util
import pathlib
import types

import pytest

from effjax.report import folder
from effjax.report import result as result_lib

_PATH = pathlib.Path(__file__).with_name("make_example.py")


@pytest.fixture(scope="session")
def example() -> types.ModuleType:
  """The module that makes up a run of eight stages."""
  spec = importlib.util.spec_from_file_location("make_example", _PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="session")
def run_folder(example, tmp_path_factory) -> pathlib.Path:
  """A finished run with its report."""
  path = tmp_path_factory.mktemp("runs") / "quickstart"
  example.write(path)
  folder.write(path, example.rows(), example.REFERENCES, {"name": "stdlib"})
  return path


@pytest.fixture(scope="session")
def result(run_folder) -> result_lib.Result:
  return result_lib.read(run_folder)
