"""Layouts on slices, as `effjax plan` prints a search over them and their scaling."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from effjax.cli import planning, pod_search, timing
from effjax.core import config as core_config
from effjax.measure.pods import planned
from effjax.recipe import config as config_lib
from effjax.recipe import pod_scaling
from effjax.recipe import pod_search as search_lib

_GB = 1e9
# Layouts that are listed as they rank in closed form.
_LISTED = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """What a search found.

  Attributes:
    topology: the slice.
    ranked: layouts that fit, the best first, in closed form.
    checked: the best of them as compiled, the best first.
    secs: how long ranking took.
  """

  topology: str
  ranked: list[search_lib.Candidate]
  checked: list[pod_search.Checked]
  secs: float

  @property
  def winner(self) -> search_lib.Candidate | None:
    """The fastest that fits as compiled; as ranked, where none was compiled."""
    if not self.checked:
      return self.ranked[0]
    fitting = (one for one in self.checked if one.compiled.get("fits"))
    return next((one.candidate for one in fitting), None)

  def text(self) -> str:
    """Both tables and the winner's overrides."""
    parts = [
      timing.Table(
        title=f"layouts on {self.topology}, in closed form: the best of "
        f"{len(self.ranked)} that fit, ranked in {self.secs:.0f} s",
        rows=[_ranked(i, one) for i, one in enumerate(self.ranked[:_LISTED], 1)],
        notes=["step and MFU: as those of a compiled step, see below"],
      ).markdown()
    ]
    if self.checked:
      places = {id(one): i for i, one in enumerate(self.ranked, 1)}
      parts.append(
        timing.Table(
          title="the best of them, compiled",
          rows=[_checked(places[id(one.candidate)], one) for one in self.checked],
          notes=[
            "rank: in closed form; error: of the closed form against the compiled step",
            *(f"rank {places[id(one.candidate)]}: {one.problem}" for one in self._bad),
            *planned.notes(),
          ],
        ).markdown()
      )
    winner = self.winner
    parts.append(
      "none of these fits as compiled: compile more of them (--compile)"
      if winner is None
      else "the best layout:\n  "
      + " ".join(winner.overrides or ("as the config says",))
    )
    return "\n\n".join(parts)

  @property
  def _bad(self) -> list[pod_search.Checked]:
    return [one for one in self.checked if one.problem]

  def plain(self) -> dict[str, Any]:
    """The same for machines."""
    winner = self.winner
    return {
      "topology": self.topology,
      "num_fitting": len(self.ranked),
      "ranked": [one.fields() for one in self.ranked[:_LISTED]],
      "compiled": [
        {
          **one.candidate.fields(),
          "compiled": one.compiled,
          "step_secs_error": one.secs_error,
          "hbm_bytes_error": one.hbm_error,
          "problem": one.problem,
        }
        for one in self.checked
      ],
      "overrides": None if winner is None else list(winner.overrides),
    }


def search(request: planning.Request, count: int) -> Found:
  """Ranks every layout and compiles the best.

  Args:
    request: the recipe and the slice.
    count: layouts to compile; 0 for none.

  Raises:
    InputError: see pod_search.search; a negative count.
  """
  core_config.require(count >= 0, f"--compile {count} must not be negative")
  # With libtpu installed JAX would look for a TPU.
  jax.config.update("jax_platforms", "cpu")
  config = config_lib.load(request.config, list(request.overrides))
  start = time.perf_counter()
  ranked = search_lib.search(config, request.topology, request.stage)
  secs = time.perf_counter() - start
  number = min(count, len(ranked))
  print(
    f"plan: {len(ranked)} layouts fit, ranked in {secs:.0f} s; compiling {number} of "
    "them, a minute or more each",
    file=sys.stderr,
  )
  checked = pod_search.compile_best(request, ranked, number) if number else []
  return Found(topology=request.topology, ranked=ranked, checked=checked, secs=secs)


def scale(
  request: planning.Request, larger: Sequence[str], plot: str | None
) -> timing.Table:
  """Weak scaling of usual presets, from the request's slice to larger ones.

  Args:
    request: the recipe and the first slice, for which its batch is.
    larger: the other slices.
    plot: where to draw the curves, if anywhere.

  Raises:
    InputError: see pod_scaling.scale.
  """
  jax.config.update("jax_platforms", "cpu")
  config = config_lib.load(request.config, list(request.overrides))
  names = (request.topology, *larger)
  points = pod_scaling.scale(config, names, request.stage)
  table = timing.Table(
    title=f"weak scaling from {names[0]} to {names[-1]}, in closed form",
    rows=[point.row() for point in points],
    notes=[
      "the batch grows with the chips, so that each keeps its tokens",
      "chip: computing and memory, ici: links, both at peak rates; step: both, times "
      "what published runs took longer",
      "even_tokens: tokens a chip below which sending takes longer than computing; "
      "-: with any number",
    ],
  )
  if plot:
    table.draw(
      timing.Curves(x="chips", ys=("step_secs", "ici_secs"), by="preset"), plot
    )
  return table


def _layout(rank: int, one: search_lib.Candidate) -> dict[str, Any]:
  return {
    "rank": rank,
    "preset": one.mesh.preset,
    "mesh": " ".join(f"{axis} {n}" for axis, n in one.shape.items()),
    "remat": one.remat,
    "micro_batches": one.micro_batches,
  }


def _ranked(rank: int, one: search_lib.Candidate) -> dict[str, Any]:
  made = one.estimate
  return {
    **_layout(rank, one),
    "hbm_gb": made.hbm_bytes / _GB,
    "sent_gb": made.collective_bytes / _GB,
    "step_secs": made.step_secs,
    "mfu_percent": 100 * made.mfu,
  }


def _checked(rank: int, one: pod_search.Checked) -> dict[str, Any]:
  made, of = one.compiled, lambda name: one.compiled.get(name)
  percent = lambda part: None if part is None else 100 * part
  return {
    **_layout(rank, one.candidate),
    "fits": {True: "yes", False: "no", None: "-"}[of("fits")],
    "hbm_gb": made["hbm_bytes"] / _GB if made else None,
    "hbm_error_percent": percent(one.hbm_error),
    "step_secs": of("step_secs"),
    "step_error_percent": percent(one.secs_error),
    "mfu_percent": percent(of("mfu")),
    "compile_secs": of("compile_secs"),
  }
