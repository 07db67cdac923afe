"""Weak scaling on paper: slices that grow, and batches that grow with them.

In closed form (effjax.measure.pods.closed_form), so in seconds; nothing is compiled.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core import config as core_config
from effjax.core import errors
from effjax.measure.pods import chips, closed_form, laid, traced
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import topology
from effjax.recipe import config as config_lib
from effjax.recipe import pods

# Preset and the sizes of its axes but the main one, which takes what is left.
LANES: tuple[tuple[str, Mapping[str, int]], ...] = (
  ("dp", {}),
  ("zero1", {}),
  ("fsdp", {}),
  ("hsdp", {"data": 4}),
  ("fsdp+tp", {"tensor": 4}),
  ("fsdp+tps", {"tensor": 4}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """One preset on one slice.

  Attributes:
    topology: the slice.
    preset: the preset.
    mesh: chips along each axis of more than one.
    estimate: of a step; None where the model or its batch does not divide.
    even_tokens: tokens a chip of which it computes as long as it sends: with fewer
      communication takes over. None where it does not divide, or with any number.
  """

  topology: str
  preset: str
  mesh: dict[str, int]
  estimate: closed_form.Estimate | None = None
  even_tokens: float | None = None

  def row(self) -> dict[str, Any]:
    """Plain values."""
    made = self.estimate
    found = {
      "topology": self.topology,
      "chips": chips.parse(self.topology).num_chips,
      "preset": self.preset,
      "mesh": " ".join(f"{axis} {n}" for axis, n in self.mesh.items()),
      "fits": "-" if made is None else ("yes" if made.fits else "no"),
    }
    values = {"hbm_gb": None, "chip_secs": None, "ici_secs": None}
    values |= {"step_secs": None, "mfu_percent": None}
    if made is not None:
      values = {
        "hbm_gb": made.hbm_bytes / 1e9,
        "chip_secs": made.chip_secs,
        "ici_secs": made.ici_secs,
        "step_secs": made.step_secs,
        "mfu_percent": 100 * made.mfu,
      }
    return found | values | {"even_tokens": self.even_tokens}


def scale(
  config: config_lib.Config, topologies: Sequence[str], stage: str | None = None
) -> list[Point]:
  """Every preset of LANES on every slice.

  Args:
    config: the root config; its batch is that of the first slice, and grows with the
      chips. Its mesh is what is varied.
    topologies: slices, such as ("v5p:2x2x4", "v5p:4x4x4").
    stage: name of the stage; None for the first that trains.

  Raises:
    InputError: an unknown slice, or a batch that the first one's chips do not divide.
  """
  slices = [chips.parse(name) for name in topologies]
  alone = dataclasses.replace(config, mesh=mesh_lib.MeshConfig(num_devices=1))
  steps, one = pods.training(alone, topologies[0], stage)
  first = slices[0].num_chips
  core_config.require(
    steps.batch_size % first == 0,
    f"a batch of {steps.batch_size} sequences does not divide among the {first} chips "
    f"of {topologies[0]}, from which it grows; make it a multiple",
  )
  facts = traced.facts(steps, one, pods.model_flops(steps))
  return [
    _point(facts, slice_, slice_.num_chips / first, preset, shape)
    for slice_ in slices
    for preset, shape in LANES
  ]


def _point(
  facts: traced.Facts,
  slice_: chips.Slice,
  growth: float,
  preset: str,
  shape: Mapping[str, int],
) -> Point:
  def of(factor: float) -> traced.Facts:
    steps = facts.steps
    grown = dataclasses.replace(steps, batch_size=round(steps.batch_size * factor))
    return dataclasses.replace(
      facts, steps=grown, model_flops=facts.model_flops * factor
    )

  config = mesh_lib.MeshConfig(preset=preset, shape=dict(shape))
  spread = topology.spread(slice_.name, config)
  mesh = {axis: n for axis, n in spread.mesh.shape.items() if n > 1}
  once, twice = of(growth), of(2 * growth)
  lies = laid.Laid(once, spread)
  try:
    lies.check()
  except errors.InputError:
    return Point(topology=slice_.name, preset=preset, mesh=mesh)
  small, large = (
    closed_form.Estimate(
      laid=lies,
      facts=grown,
      micro_batches=facts.steps.config.micro_batches,
      slice=slice_,
    )
    for grown in (once, twice)
  )
  return Point(
    topology=slice_.name,
    preset=preset,
    mesh=mesh,
    estimate=small,
    even_tokens=_even(small, large),
  )


def _even(small: closed_form.Estimate, large: closed_form.Estimate) -> float | None:
  """Tokens a chip at which both take equally long, as both are linear in tokens."""
  steps, chips_ = small.facts.steps, small.laid.spread.mesh.size
  tokens = steps.batch_size * steps.length / chips_
  slack = small.chip_secs - small.ici_secs
  gained = (large.chip_secs - large.ici_secs - slack) / tokens
  return max(0.0, tokens - slack / gained) if gained > 0 else None
