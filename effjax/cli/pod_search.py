"""The best layouts of a search, compiled one after the other to see if it was right."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from effjax.cli import planning
from effjax.core import errors
from effjax.recipe import pod_search


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
  """An estimate beside what the compiler makes of the same layout.

  Attributes:
    candidate: the layout and its estimate.
    compiled: fields of `planned.Planned`; empty where it does not compile.
    problem: one line that says why it does not; empty otherwise.
  """

  candidate: pod_search.Candidate
  compiled: dict[str, Any]
  problem: str = ""

  @property
  def secs_error(self) -> float | None:
    """How much too long the estimated step is, as a part of the compiled one's."""
    secs = self.compiled.get("step_secs")
    return None if secs is None else self.candidate.estimate.step_secs / secs - 1

  @property
  def hbm_error(self) -> float | None:
    """How much too large the estimated memory is, as a part of the compiled one's."""
    needed = self.compiled.get("hbm_bytes")
    return None if needed is None else self.candidate.estimate.hbm_bytes / needed - 1


def compile_best(
  request: planning.Request,
  candidates: Sequence[pod_search.Candidate],
  count: int = 6,
) -> list[Checked]:
  """Compiles the first candidates of a search, each in a process of its own.

  Args:
    request: what was searched: its config, overrides, topology and stage.
    candidates: of `pod_search.search` for it.
    count: how many to compile; programs that were compiled before are found on disk.

  Returns:
    The fastest that fits first, as compiled; those that do not compile last.
  """
  found = [_checked(request, candidate) for candidate in candidates[:count]]
  last = float("inf")
  return sorted(
    found,
    key=lambda one: (
      not one.compiled.get("fits", False),
      one.compiled.get("step_secs") or last,
    ),
  )


def _checked(request: planning.Request, candidate: pod_search.Candidate) -> Checked:
  changed = dataclasses.replace(
    request, overrides=(*request.overrides, *candidate.overrides), decode=None
  )
  try:
    made = planning.run(changed)["train"]
  except errors.EffjaxError as error:
    return Checked(candidate=candidate, compiled={}, problem=str(error))
  return Checked(candidate=candidate, compiled=made)
