"""`where`: which parameters of a tree a technique applies to."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from effjax.core import config, errors
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
  """A selection of parameters; all given conditions must hold.

  Attributes:
    kind: kinds of parameter (see specs.KINDS); empty for any kind.
    path: regular expression searched in the path; empty for any path.
    not_path: regular expression that must not be found in the path.
  """

  kind: tuple[str, ...] = ()
  path: str = ""
  not_path: str = ""

  def __post_init__(self):
    for kind in self.kind:
      if kind not in specs_lib.KINDS:
        raise errors.unknown("kind of parameter", kind, specs_lib.KINDS)
    for name in ("path", "not_path"):
      try:
        re.compile(getattr(self, name))
      except re.error as error:
        raise errors.InputError(
          f"{name}={getattr(self, name)!r} is not a regular expression: {error}"
        ) from None


def parse(where: Where | Mapping[str, Any] | None, default: Where) -> Where:
  """A user's `where` as a Where; `default` stands for None."""
  if where is None or isinstance(where, Where):
    return where or default
  values = dict(where)
  if isinstance(values.get("kind"), str):
    values["kind"] = (values["kind"],)
  return config.build(Where, values, "where")


def select(specs: Mapping[str, Any], where: Where) -> frozenset[str]:
  """Paths of the parameters that `where` selects.

  Raises:
    InputError: the selection is empty.
  """
  chosen = frozenset(
    path
    for path, spec in tree_lib.flatten(specs).items()
    if spec is not None
    and (not where.kind or spec.kind in where.kind)
    and re.search(where.path, path)
    and not (where.not_path and re.search(where.not_path, path))
  )
  if not chosen:
    some = ", ".join(list(tree_lib.flatten(specs))[:3])
    raise errors.InputError(f"{where} selects no parameter; paths look like {some}")
  return chosen
