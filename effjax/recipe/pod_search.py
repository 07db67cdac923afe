"""The layouts of a training on a slice, tried in closed form: the best ones first.

A layout is a preset with the shape of its mesh, what is recomputed, and micro-batches.
Data presets alone, with "tp" or "tps", with "ep", and all three are tried; "ring",
"ulysses" and "pp" are not, as what they send has no closed form here. Estimates are
those of `effjax.measure.pods.closed_form`: some seconds for all, to be confirmed by
compiling the best.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effjax.core import config as core_config
from effjax.core import errors
from effjax.measure.pods import chips, closed_form, laid, traced
from effjax.models import config as model_config
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules, topology
from effjax.recipe import config as config_lib
from effjax.recipe import pods

_DATA = ("", "dp", "zero1", "zero2", "fsdp", "hsdp")
_TENSOR = ("", "tp", "tps")
_EXPERT = ("", "ep")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
# Larger slices to look for room in, of two and of three axes.
_SHAPES = {
  2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  3: ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}
_GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """One layout.

  Attributes:
    mesh: the preset and the shape, without the main axis, which takes what is left.
    remat: what the backward pass recomputes.
    micro_batches: parts of a batch.
    estimate: what it would take.
    overrides: what makes a config use it, as on a command line.
  """

  mesh: mesh_lib.MeshConfig
  remat: str
  micro_batches: int
  estimate: closed_form.Estimate
  overrides: tuple[str, ...]

  @property
  def shape(self) -> dict[str, int]:
    """Chips along each axis of the mesh that has more than one."""
    sizes = self.estimate.laid.spread.mesh.shape
    return {axis: size for axis, size in sizes.items() if size > 1}

  def fields(self) -> dict[str, Any]:
    """The layout and what it would take, as plain values; see closed_form.Estimate."""
    names = ("step_secs", "mfu", "hbm_bytes", "memory", "flops", "hbm_traffic_bytes")
    names += ("collective_bytes", "chip_secs", "ici_secs")
    return {
      "preset": self.mesh.preset,
      "shape": self.shape,
      "remat": self.remat,
      "micro_batches": self.micro_batches,
      "overrides": list(self.overrides),
      **{name: getattr(self.estimate, name) for name in names},
    }


def search(
  config: config_lib.Config, topology_name: str, stage: str | None = None
) -> list[Candidate]:
  """All layouts that fit, the fastest first, of equally fast ones the smallest.

  Args:
    config: the root config; its mesh, its recomputation and the stage's micro-batches
      are what is varied (an imported model keeps its recomputation).
    topology_name: such as "v5e:16x16".
    stage: name of the stage; None for the first that trains.

  Raises:
    InputError: nothing fits, which names the smallest slice that could hold it, or
      nothing divides; see also pods.training.
  """
  slice_ = chips.parse(topology_name)
  alone = dataclasses.replace(config, mesh=mesh_lib.MeshConfig(num_devices=1))
  steps, one = pods.training(alone, topology_name, stage)
  index = _index(config, stage)
  model = steps.training.model
  core_config.require(
    getattr(model, "runs", None) is not None,
    "the search needs scanned layers, and the model's are unrolled; set scan=True",
  )
  remats = (model.config.remat,) if config.imported else model_config.REMAT
  first = traced.facts(steps, one, pods.model_flops(steps))
  facts = {remat: traced.recomputing(first, remat, one) for remat in remats}
  found = list(_tried(config, index, slice_, facts))
  core_config.require(
    bool(found),
    f"no mesh of {slice_.num_chips} chips divides the model's heads, hidden units and "
    f"experts and a batch of {steps.batch_size}; change data.batch_size",
  )
  fitting = [one for one in found if one.estimate.fits]
  if not fitting:
    raise errors.InputError(_too_small(config, index, slice_, facts, found))
  by = lambda one: (one.estimate.step_secs, one.estimate.hbm_bytes)
  return sorted(fitting, key=by)


def _index(config: config_lib.Config, stage: str | None) -> int:
  trains = [s.name for s in config.stages if s.technique == config_lib.TRAIN]
  return [s.name for s in config.stages].index(stage or trains[0])


def _tried(
  config: config_lib.Config,
  index: int,
  slice_: chips.Slice,
  facts: Mapping[str, traced.Facts],
) -> Iterator[Candidate]:
  """Every layout that the model and its batch divide into."""
  devices = topology.devices(slice_.name)
  first = next(iter(facts.values()))
  known = {a for spec in first.specs.values() for a in spec.axes}
  batch_size = first.steps.batch_size
  for mesh in meshes(slice_.num_chips, "experts" in known, config.mesh.replicate):
    sizes = dict(zip(rules.AXES, mesh_lib.sizes(mesh, len(devices)), strict=True))
    batch = {
      axis for name, axis in rules.find(mesh.preset).activations if name == "batch"
    }
    ways = math.prod(sizes[axis] for axis in batch)
    if batch_size % ways:
      continue
    lies = laid.Laid(first, topology.over(devices, mesh))
    try:
      lies.check()
    except errors.InputError:
      continue
    parts = [n for n in MICRO_BATCHES if batch_size % (ways * n) == 0]
    for (remat, traced_), micro_batches in itertools.product(facts.items(), parts):
      yield Candidate(
        mesh=mesh,
        remat=remat,
        micro_batches=micro_batches,
        estimate=closed_form.Estimate(
          laid=lies, facts=traced_, micro_batches=micro_batches, slice=slice_
        ),
        overrides=_overrides(config, index, mesh, remat, micro_batches),
      )


def meshes(
  num_chips: int, with_experts: bool, replicate: str = ""
) -> Iterator[mesh_lib.MeshConfig]:
  """Every preset with every shape of more than one chip along each of its axes."""
  if num_chips == 1:
    yield mesh_lib.MeshConfig(preset="dp", replicate=replicate)
    return
  for parts in itertools.product(_DATA, _TENSOR, _EXPERT if with_experts else ("",)):
    name = "+".join(filter(None, parts))
    if not name:
      continue
    preset = rules.find(name)
    others = [axis for axis in preset.axes if axis != preset.main_axis]
    divisors = [n for n in range(2, num_chips) if num_chips % n == 0]
    for sizes in itertools.product(divisors, repeat=len(others)):
      taken = math.prod(sizes)
      if num_chips % taken == 0 and taken < num_chips:
        shape = dict(zip(others, sizes, strict=True))
        yield mesh_lib.MeshConfig(preset=name, shape=shape, replicate=replicate)


def _overrides(
  config: config_lib.Config,
  index: int,
  mesh: mesh_lib.MeshConfig,
  remat: str,
  micro_batches: int,
) -> tuple[str, ...]:
  """Assignments that turn a config into one of this layout."""
  found = {"mesh.preset": mesh.preset}
  # What the config says of another preset's mesh must not stay.
  if config.mesh.shape:
    found["mesh.shape"] = "{}"
  plain = mesh_lib.MeshConfig()
  for name in ("num_devices", "micro_batches", "repeats"):
    if getattr(config.mesh, name) != getattr(plain, name):
      found[f"mesh.{name}"] = str(getattr(plain, name))
  found |= {f"mesh.shape.{axis}": str(n) for axis, n in mesh.shape.items()}
  if config.model.remat != remat:
    found["model.remat"] = remat
  if config.stages[index].options["micro_batches"] != micro_batches:
    found[f"stages[{index}].options.micro_batches"] = str(micro_batches)
  return tuple(f"--config.{name}={value}" for name, value in found.items())


def _too_small(
  config: config_lib.Config,
  index: int,
  slice_: chips.Slice,
  facts: Mapping[str, traced.Facts],
  found: Sequence[Candidate],
) -> str:
  """One line: what is needed, and which slice of the generation has it."""
  least = _least(found)
  generation = slice_.name.partition(":")[0]
  line = (
    f"nothing fits {slice_.name}: a chip needs at least {_needs(least)} and has "
    f"{slice_.chip.hbm_bytes / _GB:.1f} GB; "
  )
  for shape in _SHAPES[slice_.chip.axes]:
    larger = chips.parse(f"{generation}:{shape}")
    if larger.num_chips <= slice_.num_chips:
      continue
    tried = list(_tried(config, index, larger, facts))
    if tried and _least(tried).estimate.fits:
      return (
        line
        + f"the smallest that could hold it is {larger.name}, where one "
        + (f"needs {_needs(_least(tried))}")
      )
  return (
    line
    + f"no larger {generation} slice tried here has room either, with this "
    + ("batch; make data.batch_size smaller")
  )


def _least(found: Sequence[Candidate]) -> Candidate:
  return min(found, key=lambda one: one.estimate.hbm_bytes)


def _needs(one: Candidate) -> str:
  shape = ", ".join(f"{axis} {size}" for axis, size in one.shape.items())
  return (
    f"{one.estimate.hbm_bytes / _GB:.1f} GB ({one.mesh.preset}: {shape}; remat "
    f"{one.remat}, micro_batches {one.micro_batches})"
  )
