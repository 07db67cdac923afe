"""What holds for every corpus because it is a file of the package."""

import subprocess
import sys

import pytest

from effjax.core import errors, registry
from effjax.data import config

NAMES = registry.names(config.BUILDERS)


def test_all_are_there():
  wanted = {"stdlib", "sotu", "fashion_mnist", "text_files", "jsonl", "parquet"}
  assert wanted | {"tfds_directory", "array_record", "synthetic"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_has_a_summary_and_refuses_what_it_does_not_know(name, tmp_path):
  assert 10 < len(registry.summary(config.BUILDERS, name)) < 100
  technique = registry.find(config.BUILDERS, name)
  assert getattr(technique, "KEY", name) == name
  with pytest.raises(errors.InputError, match="unknown field of config.data.options"):
    technique.check({"no_such_option": 1}, str(tmp_path))
  config.DataConfig(corpus=name)


def test_opening_a_corpus_loads_no_framework_and_prints_nothing(
  tmp_path, subprocess_env
):
  code = (
    "import sys; from effjax.data import config, pipeline\n"
    "data = pipeline.open_data(config.DataConfig(corpus='synthetic', vocab_size=300,"
    " sequence_length=16))\n"
    "next(data.train_iterator())\n"
    "assert not {'tensorflow', 'torch', 'transformers'} & set(sys.modules)\n"
  )
  result = subprocess.run(
    [sys.executable, "-W", "error", "-c", code],
    env=subprocess_env | {"EFFJAX_CACHE": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
