import pytest

from effjax.core import errors
from effjax.recipe import overrides


def _config():
  return {
    "seed": 0,
    "train": {"rate": 1e-3, "name": "adamw", "clip": None},
    "stages": ({"name": "train"}, {"name": "int8", "options": {"bits": 8}}),
  }


@pytest.mark.parametrize(
  ("override", "look_up", "expected"),
  [
    ("--config.seed=7", lambda c: c["seed"], 7),
    ("seed=7", lambda c: c["seed"], 7),
    ("--config.train.rate=2e-4", lambda c: c["train"]["rate"], 2e-4),
    # A string stays a string, even one that looks like a number.
    ("--config.train.name=12", lambda c: c["train"]["name"], "12"),
    ("--config.train.name=None", lambda c: c["train"]["name"], None),
    ("--config.train.name=none", lambda c: c["train"]["name"], "none"),
    ("--config.train.clip=0.5", lambda c: c["train"]["clip"], 0.5),
    ("--config.train.fresh=true", lambda c: c["train"]["fresh"], True),
    (
      "--config.stages[1].options.bits=3",
      lambda c: c["stages"][1]["options"]["bits"],
      3,
    ),
    (
      "--config.stages[0].options.bits=3",
      lambda c: c["stages"][0]["options"],
      {"bits": 3},
    ),
    ("--config.mesh.shape.fsdp=8", lambda c: c["mesh"]["shape"], {"fsdp": 8}),
    ("--config.train.name=a=b", lambda c: c["train"]["name"], "a=b"),
  ],
)
def test_one_override(override, look_up, expected):
  before = _config()
  assert look_up(overrides.apply(before, [override])) == expected
  assert before == _config(), "the given config was changed"


def test_later_overrides_win():
  assert overrides.apply(_config(), ["seed=1", "seed=2"])["seed"] == 2


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("--config.seed", "has no value"),
    ("--config.=1", "does not name a field"),
    ("--config.a..b=1", "does not name a field"),
    ("--config.stages[x].name=1", "does not name a field"),
    ("--config.stages[9].name=x", "the last is [1]"),
    ("--config.stages.name=x", "write config.stages[0].name"),
    ("--config.seed.x=1", "has no field 'x'"),
    ("--config.seed[0]=1", "is not a list"),
  ],
)
def test_bad_overrides_are_input_errors(override, message):
  with pytest.raises(errors.InputError) as caught:
    overrides.apply(_config(), [override])
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
