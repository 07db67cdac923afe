"""The points of a sweep: which values of which fields are tried together.

A point maps config fields to texts, each what an override would say; the field `arg` is
the argument of the recipe. Axes are combined in every way, the last one fastest; the
fields of one axis move together.
"""

import ast
import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core import config as core_config
from effjax.core import errors
from effjax.recipe import config as config_lib
from effjax.recipe import files
from effjax.sweep import search as search_lib

ARG = "arg"
# What seeds set: initialization and noise, and the order of the data.
SEED_FIELDS = ("seed", "data.seed")
_FILE_FIELDS = ("config", "grid", "lists", "seeds")

Point = Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
  """Fields that move together.

  Attributes:
    fields: names, such as ("model.embed_dim",).
    rows: the values of each step, one text a field.
  """

  fields: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """A recipe and the points to run it at.

  Attributes:
    config: `FILE[:ARG]`.
    changes: overrides that all points share.
    axes: what differs.
    search: what chooses the points in place of the axes, or None.
  """

  config: str
  changes: tuple[str, ...]
  axes: tuple[Axis, ...]
  search: search_lib.Search | None = None

  @property
  def fields(self) -> tuple[str, ...]:
    """Every swept field."""
    if self.search is not None:
      return self.search.fields
    return tuple(field for axis in self.axes for field in axis.fields)

  def points(self) -> list[Point]:
    """Every combination of the axes; of a search, points that stand for all."""
    if self.search is not None:
      return self.search.corners()
    return [
      dict(zip(self.fields, itertools.chain(*rows), strict=True))
      for rows in itertools.product(*(axis.rows for axis in self.axes))
    ]

  def about(self) -> dict[str, Any]:
    """What all workers of a sweep must agree on, as plain JSON.

    The values of a grid and the number of trials are not part of it: more can join.
    """
    found: dict[str, Any] = {
      "config": self.config,
      "changes": list(self.changes),
      "fields": list(self.fields),
    }
    if self.search is not None:
      found["search"] = core_config.to_dict(self.search)
      del found["search"]["num_trials"]
    return found

  def run_arguments(self, point: Point) -> tuple[str, list[str]]:
    """`FILE[:ARG]` and the overrides of a point, as `effjax run` takes them."""
    reference = f"{self.config}:{point[ARG]}" if ARG in point else self.config
    named = [f"--config.{k}={v}" for k, v in point.items() if k != ARG]
    return reference, [*self.changes, *named]

  def check(self, point: Point) -> None:
    """Whether the config of a point is valid.

    Raises:
      InputError: it is not; the message names the point.
    """
    reference, changes = self.run_arguments(point)
    try:
      config_lib.load(reference, changes)
    except errors.InputError as error:
      raise errors.InputError(f"at {describe(point)}: {error}") from None


def make(
  reference: str,
  changes: Sequence[str] = (),
  *,
  grids: Sequence[str] = (),
  lists: Sequence[str] = (),
  seeds: str | None = None,
) -> Sweep:
  """The sweep that a config's own `get_sweep()` and a command line describe together.

  `get_sweep()` returns a dict with any of `config` (the recipe; the file itself if
  absent), `grid` and `lists` (field to values) and `seeds` (how many, or which ones).
  What the command line says of a field takes the place of what the file says.

  Args:
    reference: config file and argument.
    changes: overrides that all points share.
    grids: "FIELD=VALUE,VALUE" each, combined in every way.
    lists: the same, moving together: first with first, second with second.
    seeds: "3" for the seeds 0, 1 and 2, or "0,7" for these.

  Raises:
    InputError: nothing to sweep, lists of different lengths, a field or value twice.
  """
  said = _from_file(reference)
  axes = _axes(said.get("grid", {}), said.get("lists", {}), said.get("seeds"))
  here = _axes(_parsed(grids, "--grid"), _parsed(lists, "--list"), _parsed_seeds(seeds))
  taken = {field for axis in here for field in axis.fields}
  sweep = Sweep(
    config=said.get("config", reference),
    changes=tuple(changes),
    axes=(*(axis for axis in axes if not taken & set(axis.fields)), *here),
  )
  _check(sweep)
  return sweep


def searched(
  reference: str,
  changes: Sequence[str] = (),
  *,
  sampler: str,
  num_trials: int,
  ranges: Sequence[str] = (),
  grids: Sequence[str] = (),
) -> Sweep:
  """The sweep whose points are chosen one after another; see `search.Search`.

  Args:
    reference: config file and argument.
    changes: overrides that all points share.
    sampler: "tpe" or "random".
    num_trials: points to try in all.
    ranges: "FIELD=LOW:HIGH" each, with ":log" behind for factors.
    grids: "FIELD=VALUE,VALUE" each, values to choose from.

  Raises:
    InputError: nothing to search, no range, a field twice.
  """
  search = search_lib.Search(
    sampler=sampler,
    num_trials=num_trials,
    ranges=tuple(map(search_lib.parse_range, ranges)),
    choices=_parsed(grids, "--grid"),
  )
  config = _from_file(reference).get("config", reference)
  sweep = Sweep(config=config, changes=tuple(changes), axes=(), search=search)
  _check_fields(sweep)
  return sweep


def default_workdir(reference: str) -> pathlib.Path:
  """`runs/sweeps/<config>[-<arg>]`."""
  run = files.default_workdir(reference)
  return run.parent / "sweeps" / run.name


def describe(point: Point) -> str:
  """`model.embed_dim=64, seed=0`."""
  first, *others = SEED_FIELDS
  return ", ".join(
    f"{field}={value}"
    for field, value in point.items()
    # The seed of the data is worth a word only where it is another one.
    if not (field in others and point.get(first) == value)
  )


def _from_file(reference: str) -> dict[str, Any]:
  path, _ = files.split(reference)
  said = files.read_sweep(path)
  for name in said:
    if name not in _FILE_FIELDS:
      raise errors.unknown(f"field of get_sweep() of {path}", str(name), _FILE_FIELDS)
  return said


def _axes(grid: Mapping[str, Any], lists: Mapping[str, Any], seeds: Any) -> list[Axis]:
  axes = [
    Axis(fields=(field,), rows=tuple((text,) for text in _texts(field, values)))
    for field, values in grid.items()
  ]
  if lists:
    columns = [_texts(field, values) for field, values in lists.items()]
    if len({len(column) for column in columns}) > 1:
      counts = zip(lists, map(len, columns), strict=True)
      sizes = ", ".join(f"{field} {count}" for field, count in counts)
      raise errors.InputError(
        f"lists move together, so they must be equally long, got {sizes} values"
      )
    axes.append(Axis(fields=tuple(lists), rows=tuple(zip(*columns, strict=True))))
  if seeds is not None:
    rows = tuple((str(seed),) * len(SEED_FIELDS) for seed in _seeds(seeds))
    axes.append(Axis(fields=SEED_FIELDS, rows=rows))
  return axes


def _texts(field: str, values: Any) -> list[str]:
  if isinstance(values, str) or not isinstance(values, Sequence) or not values:
    raise errors.InputError(f"{field} is swept over a list of values, got {values!r}")
  return [value if isinstance(value, str) else repr(value) for value in values]


def _seeds(seeds: Any) -> list[int]:
  """As many as a number says, from 0, or those of a list."""
  found = list(range(seeds)) if isinstance(seeds, int) else seeds
  if (
    not isinstance(found, list | tuple)
    or not found
    or not all(isinstance(seed, int) and seed >= 0 for seed in found)
  ):
    raise errors.InputError(
      f"seeds must be how many (3 for 0, 1 and 2) or which (0,7), got {seeds!r}"
    )
  return list(found)


def _parsed_seeds(text: str | None) -> Any:
  if text is None:
    return None
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _parsed(texts: Sequence[str], flag: str) -> dict[str, list[str]]:
  """`FIELD=VALUE,VALUE` each, by field."""
  found: dict[str, list[str]] = {}
  for text in texts:
    field, equals, values = text.partition("=")
    field = field.removeprefix("config.")
    if not equals or not field or not values:
      raise errors.InputError(f"{flag} {text!r} must be FIELD=VALUE,VALUE")
    if field in found:
      raise errors.InputError(f"{flag} {field} is given twice; write all values once")
    found[field] = _split(values)
  return found


def _split(text: str) -> list[str]:
  """At the commas outside brackets and quotes."""
  parts, depth, quote, start = [], 0, "", 0
  for i, letter in enumerate(text):
    if quote:
      quote = "" if letter == quote else quote
    elif letter in "'\"":
      quote = letter
    elif letter in "([{":
      depth += 1
    elif letter in ")]}":
      depth -= 1
    elif letter == "," and depth == 0:
      parts.append(text[start:i].strip())
      start = i + 1
  return [*parts, text[start:].strip()]


def _check(sweep: Sweep) -> None:
  if not sweep.axes:
    raise errors.InputError(
      f"nothing to sweep: give --grid FIELD=VALUE,VALUE or --seeds 3, or a "
      f"get_sweep() in {sweep.config}"
    )
  _check_fields(sweep)


def _check_fields(sweep: Sweep) -> None:
  for field in sweep.fields:
    if sweep.fields.count(field) > 1:
      raise errors.InputError(f"{field} is swept twice; name it once")
  path, arg = files.split(sweep.config)
  if ARG in sweep.fields and arg:
    raise errors.InputError(
      f"{ARG} is swept, and {sweep.config} has one: write {path} without it"
    )
  for axis in sweep.axes:
    for row in axis.rows:
      if axis.rows.count(row) > 1:
        values = ", ".join(row)
        raise errors.InputError(
          f"{', '.join(axis.fields)} has the value {values} twice"
        )
