"""Runs that differ in nothing but the seed, as one: means, and how far apart they are.

A group is a Result whose rows hold means; the table adds the sample standard deviation
(n - 1) of every number that differs.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effjax.core import errors
from effjax.report import result as result_lib


def make(
  runs: Sequence[result_lib.Result], fields: Sequence[Mapping[str, str]]
) -> list[result_lib.Result]:
  """One result for the runs of equal fields, in the order of their first ones.

  Args:
    runs: finished runs.
    fields: of each run, what to group by: name to value.
  """
  found: dict[tuple[tuple[str, str], ...], list[result_lib.Result]] = {}
  for run, own in zip(runs, fields, strict=True):
    found.setdefault(tuple(own.items()), []).append(run)
  return [_group(members, dict(own)) for own, members in found.items()]


def value(config: Mapping[str, Any], field: str) -> str:
  """The value of a field such as `stages[0].options.bits` in a resolved config.

  Raises:
    InputError: there is no such field; the message names those there are at that place.
  """
  at: Any = config
  for step in re.findall(r"\w+", field):
    if isinstance(at, Mapping) and step in at:
      at = at[step]
    elif isinstance(at, list) and step.isdigit() and int(step) < len(at):
      at = at[int(step)]
    else:
      items = len(at) if isinstance(at, list) else 0
      allowed = at if isinstance(at, Mapping) else map(str, range(items))
      raise errors.unknown(f"step {step!r} of --by", field, allowed)
  return at if isinstance(at, str) else repr(at)


def deviation(
  group: result_lib.Result, stage: str, number: Callable[[Mapping[str, Any]], Any]
) -> float | None:
  """Sample standard deviation of a number of a stage's rows; None below two of them."""
  values = [number(run.row(stage)) for run in group.runs]
  if len(values) < 2 or any(value is None for value in values):
    return None
  return statistics.stdev(values)


def _group(runs: list[result_lib.Result], fields: dict[str, str]) -> result_lib.Result:
  first = runs[0]
  names = [row["stage"] for row in first.stages]
  common = [name for name in names if all(run.row(name) for run in runs)]
  return result_lib.Result(
    name=_name(fields) or "all",
    stages=tuple(_mean([run.row(name) for run in runs]) for name in common),
    references=first.references,
    corpus=first.corpus,
    config=first.config,
    env=first.env,
    metrics=first.metrics,
    fields=fields,
    runs=tuple(runs),
  )


def _name(fields: Mapping[str, str]) -> str:
  """`mamba2, embed_dim=64`: the last word of each field, none for the argument."""
  said = {field: field.rsplit(".", 1)[-1] for field in fields}
  return ", ".join(
    value if field == "arg" else f"{said[field]}={value}"
    for field, value in fields.items()
  )


def _mean(values: Sequence[Any]) -> Any:
  """Of numbers their mean, of mappings the mean of each entry, else the first."""
  first = values[0]
  if isinstance(first, Mapping):
    return {name: _mean([v.get(name) for v in values]) for name in first}
  if any(value is None for value in values):
    return None
  if isinstance(first, bool) or not isinstance(first, int | float):
    return first
  mean = statistics.fmean(values)
  return round(mean) if isinstance(first, int) else mean
