"""Every mistake in a config gets one line that names the field."""

import dataclasses

import pytest

from effjax.core import config, errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
  rate: float = 0.1
  names: tuple[str, ...] = ()
  pair: tuple[int, int] | None = None

  def __post_init__(self):
    config.require(self.rate >= 0, f"rate={self.rate} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
  steps: int
  inner: Inner = Inner()
  options: dict[str, int] = dataclasses.field(default_factory=dict)
  flag: bool = False


def test_builds_nested_values():
  built = config.build(
    Outer, {"steps": 3, "inner": {"rate": 1, "names": ["a"], "pair": (1, 2)}}
  )
  assert built == Outer(steps=3, inner=Inner(rate=1.0, names=("a",), pair=(1, 2)))
  assert isinstance(built.inner.rate, float)
  assert config.build(Outer, config.to_dict(built)) == built


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"steps": 1, "inner": {"rte": 1}}, "did you mean 'rate'"),
    ({"steps": "x"}, "config.steps must be int, got 'x' (str)"),
    ({"steps": True}, "config.steps must be int"),
    ({"steps": 1, "flag": 1}, "config.flag must be bool"),
    ({}, "config.steps is missing"),
    ({"steps": 1, "inner": {"rate": -1.0}}, "config.inner: rate=-1.0 must not"),
    ({"steps": 1, "inner": {"names": "abc"}}, "config.inner.names must be"),
    ({"steps": 1, "inner": {"names": [1]}}, "config.inner.names[0] must be str"),
    ({"steps": 1, "inner": {"pair": (1, 2, 3)}}, "config.inner.pair must be"),
    ({"steps": 1, "inner": 3}, "config.inner"),
    ({"steps": 1, "options": {"a": "b"}}, "config.options.a must be int"),
  ],
)
def test_mistakes_are_one_clear_line(values, message):
  with pytest.raises(errors.InputError) as caught:
    config.build(Outer, values)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
  radius: int
  architecture: str = "round"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
  side: int
  architecture: str = "square"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Either:
  shape: Round | Square | None = None


def test_of_several_dataclasses_the_architecture_chooses():
  build = lambda shape: config.build(Either, {"shape": shape}).shape
  assert build({"architecture": "square", "side": 2}) == Square(side=2)
  assert build({"radius": 3}) == Round(radius=3)
  assert build(config.to_dict(Square(side=2))) == Square(side=2)
  assert build(None) is None
  assert build(Square(side=1)) == Square(side=1)
  with pytest.raises(errors.InputError, match="unknown field of config.shape 'side'"):
    build({"side": 2})
  with pytest.raises(errors.InputError, match="config.shape.architecture 'squre'; did"):
    build({"architecture": "squre", "side": 2})


def test_differences_name_the_leaf():
  old = config.to_dict(Outer(steps=1, inner=Inner(names=("a",))))
  new = config.to_dict(Outer(steps=2, inner=Inner(names=("b",))))
  assert config.differences(old, new) == [
    "config.inner.names[0]: 'a' -> 'b'",
    "config.steps: 1 -> 2",
  ]
  assert config.differences(old, old) == []
