"""The recipes that compare sequence mixers, as far as their configs alone say."""

import pathlib

import jax
import pytest

from effjax.core import errors, registry
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.recipe import config as config_lib
from effjax.recipe import files
from effjax.sweep import points

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "mixers"
MIXERS = tuple(files._execute(CONFIGS / "recall.py").MIXERS)


def load(task, mixer):
  return config_lib.load(f"{CONFIGS / task}.py:{mixer}")


def num_params(model):
  built = decoder.Decoder(model)
  tree = jax.eval_shape(built.init, jax.random.key(0), *built.example_inputs())
  return sum(array.size for array in jax.tree.leaves(tree["params"]))


@pytest.mark.parametrize("task", ["recall", "listops", "language"])
def test_every_mixer_has_its_recipe(task):
  known = files._execute(CONFIGS / f"{task}.py").MIXERS
  assert set(registry.names(model_config.MIXERS)) | {"hybrid"} == set(known)
  assert tuple(known) == MIXERS
  with pytest.raises(errors.InputError, match="did you mean 'mamba2'"):
    files.read(f"{CONFIGS / task}.py:mamba3")


@pytest.mark.parametrize("task", ["recall", "listops", "language"])
def test_a_sweep_runs_every_mixer_with_the_first_seed(task):
  found = points.make(f"{CONFIGS / task}.py").points()
  assert [point["arg"] for point in found if point["seed"] == "0"] == list(MIXERS)
  assert all(point["seed"] == point["data.seed"] for point in found)


@pytest.mark.parametrize("mixer", MIXERS)
def test_language_models_have_equal_parameters(mixer):
  config = load("language", mixer)
  assert abs(num_params(config.model) / 1_100_000 - 1) < 0.01
  assert len(config.model.layers) == 4


@pytest.mark.parametrize("mixer", MIXERS)
def test_recall_trains_each_rate_from_the_same_model(mixer):
  config = load("recall", mixer)
  assert [config.parent(i) for i in range(3)] == [None] * 3
  rates = [stage.options["optimizer"]["learning_rate"] for stage in config.stages]
  assert len(set(rates)) == 3
  assert config.data.options["num_pairs"] > 16
  for layer in config.model.layers:
    options = layer.build_mixer_options()
    assert getattr(options, "head_dim", 16) == 16


@pytest.mark.parametrize("mixer", MIXERS)
def test_listops_recipe_is_valid(mixer):
  config = load("listops", mixer)
  assert config.data.options["max_length"] + 1 == config.data.sequence_length == 64
  assert config.data.options["max_depth"] == 3
