"""Points: every combination once, and one line for what cannot be swept."""

import pytest

from effjax.core import errors
from effjax.sweep import points


def test_a_grid_lists_and_seeds_give_every_combination(recipe):
  sweep = points.make(
    recipe(),
    ["--config.data.batch_size=2"],
    grids=["model.num_layers=1,2"],
    lists=["model.embed_dim=16,32", "config.stages[0].options.num_steps=4,2"],
    seeds="2",
  )
  found = [tuple(point.values()) for point in sweep.points()]
  assert found == [
    (layers, width, steps, seed, seed)
    for layers in ("1", "2")
    for width, steps in (("16", "4"), ("32", "2"))
    for seed in ("0", "1")
  ]
  reference, changes = sweep.run_arguments(sweep.points()[0])
  assert reference == recipe()
  assert changes == [
    "--config.data.batch_size=2",
    "--config.model.num_layers=1",
    "--config.model.embed_dim=16",
    "--config.stages[0].options.num_steps=4",
    "--config.seed=0",
    "--config.data.seed=0",
  ]


def test_a_file_says_what_to_sweep_and_the_command_line_overrules_it(recipe):
  path = recipe(grid={"arg": ("", "wide"), "model.logit_cap": (None, 30.0)}, seeds=3)
  sweep = points.make(path, grids=["model.logit_cap=50.0"], seeds="5,7")
  assert [tuple(point.values()) for point in sweep.points()] == [
    (arg, "50.0", seed, seed) for arg in ("", "wide") for seed in ("5", "7")
  ]
  whole = points.make(path).points()
  assert len(whole) == 2 * 2 * 3
  assert {point["model.logit_cap"] for point in whole} == {"None", "30.0"}
  assert sweep.run_arguments(sweep.points()[-1])[0] == f"{path}:wide"


def test_values_may_hold_commas_inside_brackets_and_quotes(recipe):
  sweep = points.make(
    recipe(), grids=["model.pattern=('attention',),('mamba2','attention')", "a='x,y',z"]
  )
  assert [point["model.pattern"] for point in sweep.points()[::2]] == [
    "('attention',)",
    "('mamba2','attention')",
  ]
  assert [point["a"] for point in sweep.points()[:2]] == ["'x,y'", "z"]


def test_the_seed_of_the_data_is_named_only_where_it_differs(recipe):
  same = points.make(recipe(), grids=["model.embed_dim=16"], seeds="1,").points()[0]
  assert points.describe(same) == "model.embed_dim=16, seed=1"
  other = same | {"data.seed": "2"}
  assert points.describe(other) == "model.embed_dim=16, seed=1, data.seed=2"


@pytest.mark.parametrize(
  ("said", "options", "message"),
  [
    ({}, {}, "nothing to sweep"),
    ({"grids": 1}, {}, "did you mean 'grid'?"),
    ({"grid": {"seed": 3}}, {}, "swept over a list of values, got 3"),
    ({"seeds": -1}, {}, "seeds must be how many"),
    ({}, {"seeds": "two"}, "seeds must be how many"),
    ({}, {"grids": ["model.embed_dim"]}, "must be FIELD=VALUE,VALUE"),
    ({}, {"grids": ["a=1", "a=2"]}, "given twice"),
    ({}, {"grids": ["a=1"], "lists": ["a=2"]}, "swept twice"),
    ({}, {"grids": ["seed=1"], "seeds": "2"}, "swept twice"),
    ({}, {"grids": ["a=1,2,1"]}, "value 1 twice"),
    ({}, {"lists": ["a=1,2", "b=1"]}, "a 2, b 1 values"),
  ],
)
def test_what_cannot_be_swept_is_named(recipe, said, options, message):
  with pytest.raises(errors.InputError, match=message):
    points.make(recipe(**said), **options)


def test_the_argument_is_not_swept_twice(recipe):
  with pytest.raises(errors.InputError, match="without it"):
    points.make(f"{recipe()}:wide", grids=["arg=wide"])


def test_a_point_without_a_config_is_named(recipe):
  sweep = points.make(recipe(), grids=["model.embed_dimm=8"])
  with pytest.raises(errors.InputError, match="at model.embed_dimm=8: .*'embed_dim'"):
    sweep.check(sweep.points()[0])
