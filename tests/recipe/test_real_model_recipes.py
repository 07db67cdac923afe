"""The recipes that begin with a packaged model, as far as their configs alone say."""

import pathlib

import pytest

from effjax.core import config as core_config
from effjax.core import errors
from effjax.data import config as data_config
from effjax.data.pretrained import base
from effjax.measure import config as measure_config
from effjax.recipe import config as config_lib
from effjax.recipe import files

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("argument", ["", ":smoke"])
@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_stages_and_measures_are_valid(name, argument):
  plain = files.read(f"{CONFIGS / name}.py{argument}")
  stages = [core_config.build(config_lib.StageConfig, s) for s in plain["stages"]]
  assert stages[0].options["source"] == name in base.names()
  assert len({stage.name for stage in stages}) == len(stages) > 5
  # Each is compared with the model as it came, but for the one that follows it anyway.
  assert [stage.after for stage in stages[2:]] == ["original"] * (len(stages) - 2)
  measure = core_config.build(measure_config.MeasureConfig, plain["measure"])
  assert measure.latency == (argument == "")
  data = core_config.build(data_config.DataConfig, plain["data"])
  assert data.tokenizer == "model"


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_another_argument_is_refused(name):
  with pytest.raises(errors.InputError, match="did you mean 'smoke'"):
    files.read(f"{CONFIGS / name}.py:smokey")
