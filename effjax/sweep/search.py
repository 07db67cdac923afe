"""What a search chooses from, and how it chooses: by Optuna's samplers.

In place of trying every combination, a search asks for one point after another. "tpe"
(Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization) learns from the
losses so far, and takes points that others are running for bad ones, so workers do not
all go to one place; "random" does not. The sampler of trial n is seeded with n, so one
worker alone finds the same points every time, stopped and resumed or not.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import optuna
from optuna import distributions

from effjax.core import errors

SAMPLERS = ("tpe", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
  """Numbers between two ends, both included; whole ones if both ends are.

  Attributes:
    field: config field.
    low, high: the ends.
    log: whether every factor counts the same, not every difference.
  """

  field: str
  low: int | float
  high: int | float
  log: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
  """A search.

  Attributes:
    sampler: one of SAMPLERS.
    num_trials: points to try in all.
    ranges: fields with numbers to choose from.
    choices: fields with values to choose from, as texts.
  """

  sampler: str
  num_trials: int
  ranges: tuple[Range, ...]
  choices: Mapping[str, Sequence[str]]

  def __post_init__(self):
    if self.sampler not in SAMPLERS:
      raise errors.unknown("--search", self.sampler, SAMPLERS)
    if self.num_trials < 1:
      raise errors.InputError(f"--trials must be at least 1, got {self.num_trials}")
    if not self.ranges and not self.choices:
      raise errors.InputError(
        "nothing to search: give --range FIELD=LOW:HIGH, or values to choose from by "
        "--grid FIELD=VALUE,VALUE"
      )

  @property
  def fields(self) -> tuple[str, ...]:
    """Every searched field."""
    return (*(r.field for r in self.ranges), *self.choices)

  def corners(self) -> list[dict[str, str]]:
    """Points whose configs tell whether those of all points are valid."""
    ends = [
      {r.field: repr(getattr(r, e)) for r in self.ranges} for e in ("low", "high")
    ]
    longest = max([len(values) for values in self.choices.values()] or [1])
    picks = [
      {field: values[i % len(values)] for field, values in self.choices.items()}
      for i in range(longest)
    ]
    return [end | pick for end in ends for pick in picks]

  def ask(
    self, study: optuna.Study, number: int
  ) -> tuple[optuna.Trial, dict[str, str]]:
    """A new trial of a study, and its point."""
    if self.sampler == "tpe":
      study.sampler = optuna.samplers.TPESampler(seed=number, constant_liar=True)
    else:
      study.sampler = optuna.samplers.RandomSampler(seed=number)
    trial = study.ask(self._distributions())
    values = {field: trial.params[field] for field in self.fields}
    return trial, {k: v if isinstance(v, str) else repr(v) for k, v in values.items()}

  def _distributions(self) -> dict[str, distributions.BaseDistribution]:
    found: dict[str, distributions.BaseDistribution] = {}
    for r in self.ranges:
      whole = isinstance(r.low, int) and isinstance(r.high, int)
      of = distributions.IntDistribution if whole else distributions.FloatDistribution
      found[r.field] = of(r.low, r.high, log=r.log)
    for field, values in self.choices.items():
      found[field] = distributions.CategoricalDistribution(values)
    return found


def parse_range(text: str) -> Range:
  """`FIELD=LOW:HIGH` or `FIELD=LOW:HIGH:log`.

  Raises:
    InputError: it is not that, or the ends are no range.
  """
  field, equals, rest = text.partition("=")
  low, *more = rest.split(":")
  ends = [_number(low), *map(_number, more[:1])]
  is_log = more[1:] == ["log"]
  if not equals or len(ends) < 2 or None in ends or (more[1:] and not is_log):
    raise errors.InputError(
      f"--range {text!r} must be FIELD=LOW:HIGH or FIELD=LOW:HIGH:log"
    )
  if not ends[0] < ends[1] or (is_log and ends[0] <= 0):
    raise errors.InputError(
      f"--range {text!r}: the low end must be below the high one"
      + (", and above 0 for a logarithm" if is_log else "")
    )
  return Range(
    field=field.removeprefix("config."), low=ends[0], high=ends[1], log=is_log
  )


def _number(text: str) -> int | float | None:
  for kind in (int, float):
    try:
      value = kind(text)
    except ValueError:
      continue
    return value if math.isfinite(value) else None
  return None
