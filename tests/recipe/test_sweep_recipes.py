"""The sweep of what a parameter is spent on compares what it says it compares."""

import pathlib

import jax
import pytest

from effjax.core import errors
from effjax.core import tree as tree_lib
from effjax.recipe import config as config_lib
from effjax.recipe import plan as plan_lib
from effjax.sweep import points

PATH = str(pathlib.Path(__file__).parents[2] / "configs" / "sweeps" / "parameters.py")
TABLE = {
  "dense": (1.12, 1.12),
  "moe-active": (1.12, 2.89),
  "moe-total": (0.68, 1.12),
  "low-rank": (1.12, 1.12),
  "shared-active": (1.12, 0.69),
  "shared-total": (1.96, 1.11),
}


@pytest.mark.parametrize(("arg", "millions"), TABLE.items())
def test_parameters_are_those_of_the_docstring(arg, millions):
  plan = plan_lib.make(config_lib.load(f"{PATH}:{arg}"))
  sizes = {
    path: sum(a.size for a in jax.tree.leaves(leaf))
    for path, leaf in tree_lib.flatten(plan.outcomes[-1].params).items()
  }
  total, model = sum(sizes.values()), plan.model.config
  active = 0
  for path, size in sizes.items():
    used = size * (model.share if path.startswith("run_") else 1)
    is_expert = model.mlp == "moe" and "/mlp/" in path and "router" not in path
    active += used * 2 / 8 if is_expert else used
  assert (round(active / 1e6, 2), round(total / 1e6, 2)) == millions
  lines = pathlib.Path(PATH).read_text().splitlines()
  models, results = [line for line in lines if line.startswith(f"| {arg} |")]
  assert models.endswith(f"| {millions[0]:.2f} M | {millions[1]:.2f} M |")
  assert f"| {millions[0]:.2f} M, {millions[1]:.2f} M |" in results


def test_every_decoder_has_three_seeds():
  sweep = points.make(PATH)
  assert len(sweep.points()) == 3 * len(TABLE)
  assert {point["arg"] for point in sweep.points()} == set(TABLE)
  for point in sweep.points()[::3]:
    sweep.check(point)


def test_an_unknown_decoder_is_named():
  with pytest.raises(errors.InputError, match="did you mean 'low-rank'"):
    config_lib.load(f"{PATH}:lowrank")
